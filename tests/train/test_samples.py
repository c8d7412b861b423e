"""Runs with documents, loss masks and validation data, against plain computations."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from rwkv.checkpoint import load_model, read_tensors
from rwkv.config import ConvertConfig, LoRAConfig, TrainConfig
from rwkv.data.binidx import Dataset, mask_path
from rwkv.data.binidx_writer import writer
from rwkv.data.convert.pipeline import convert
from rwkv.data.token_stream import Stream, split
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.train import samples
from rwkv.train.fit import fit
from tests.train.small_runs import lines

CTX = 12
FLAGS = {"ctx_len": CTX, "micro_bsz": 3, "epoch_steps": 4, "epoch_count": 2, "random_seed": 1, "accelerator": "cpu"}
FLAGS |= {"precision": "fp32"}
NO_UPDATE = {"lr_init": 0.0, "lr_final": 0.0}


@pytest.fixture
def documents(tmp_path):
    """A binidx of 120 documents that end with 0, and a loss mask of about half of the tokens."""
    generator = torch.Generator().manual_seed(5)
    with writer(tmp_path / "d_text_document") as out:
        for _ in range(120):
            length = int(torch.randint(2, CTX + 1, (1,), generator=generator))
            out.add([*torch.randint(1, 50, (length - 1,), generator=generator).tolist(), 0])
        tokens = out.tokens
    mask_path(tmp_path / "d_text_document").write_bytes(
        bytes(torch.randint(2, (tokens,), generator=generator).tolist())
    )
    return str(tmp_path / "d_text_document")


def plain_mean(model, items, reset: bool) -> tuple[float, int]:
    """Mean cross-entropy over the masked targets and their number, computed without resets and
    masks in the model; with `reset` each document separately.
    """
    total = count = 0
    for x, y, loss_mask, starts in items:
        edges = [0, *(t for t in range(1, len(x)) if reset and starts[t]), len(x)]
        for begin, end in itertools.pairwise(edges):
            with torch.no_grad():
                logits = model(x[None, begin:end])[0][0]
            each = F.cross_entropy(logits, y[begin:end], reduction="none")
            total += float(each[loss_mask[begin:end]].double().sum())
            count += int(loss_mask[begin:end].sum())
    return total / count, count


MODES = [{}, {"doc_training": 1}, {"doc_training_seq": 1, "min_ctx_len": CTX}, {"magic_prime": -1}]
MASKED = [("4", mode, reset) for mode in MODES for reset in (0, 1)]
MASKED += [(version, {"doc_training": 1}, 1) for version in ("5.2", "6", "7")]


@pytest.mark.parametrize(("version", "mode", "reset"), MASKED, ids=str)
def test_loss_is_mean_over_masked_targets(make_base, documents, tmp_path, version, mode, reset):
    base = make_base(version=version)
    config = TrainConfig(
        **FLAGS | NO_UPDATE,
        **mode,
        doc_reset=reset,
        load_model=str(base),
        data_file=documents,
        proj_dir=str(tmp_path / "run"),
        max_steps=3,
    )
    fit(config)
    data, _ = samples.make(config, Dataset(documents))
    for step, line in enumerate(lines(tmp_path / "run")):
        expected, count = plain_mean(load_model(base), [data[i] for i in range(3 * step, 3 * step + 3)], bool(reset))
        assert line["loss"] == pytest.approx(expected, rel=1e-5)  # fp32, different summation order
        assert line["targets"] == count


def test_validation_loss(make_base, documents, tmp_path):
    base = make_base()
    config = TrainConfig(
        **FLAGS | NO_UPDATE,
        load_model=str(base),
        data_file=documents,
        proj_dir=str(tmp_path / "run"),
        val_split=0.2,
        val_every=3,
        val_samples=0,
    )
    result = fit(config)
    data = Dataset(documents)
    validation = Stream(data, split(data, 0.2, CTX)[1])
    contexts = [validation.read(i, i + CTX + 1) for i in range(0, len(validation) - CTX, CTX)]
    items = [tuple(map(torch.from_numpy, (p.ids[:-1], p.ids[1:], p.loss_mask[1:], p.starts[:-1]))) for p in contexts]
    expected, _ = plain_mean(load_model(base), items, False)
    found = {line["step"]: line["val_loss"] for line in lines(tmp_path / "run") if "val_loss" in line}
    assert list(found) == [3, 4, 6, 8]  # every third step, and ends of epochs
    assert list(found.values()) == pytest.approx([expected] * 4, rel=1e-5)
    assert result.val_loss == found[8]


@pytest.fixture
def other(tmp_path, documents):
    """Other documents with another loss mask, as a validation set."""
    generator = torch.Generator().manual_seed(6)
    with writer(tmp_path / "v_text_document") as out:
        for length in range(2, CTX + 2):
            out.add([*torch.randint(1, 50, (length - 1,), generator=generator).tolist(), 0])
        tokens = out.tokens
    mask_path(tmp_path / "v_text_document").write_bytes(bytes(i % 3 == 0 for i in range(tokens)))
    return str(tmp_path / "v_text_document")


@pytest.mark.parametrize("mode", [{}, {"doc_training": 1, "doc_reset": 1}], ids=str)
def test_val_file(make_base, documents, other, tmp_path, mode):
    base = make_base()
    flags = FLAGS | mode | {"load_model": str(base), "data_file": documents, "val_samples": 0}
    config = TrainConfig(**flags | NO_UPDATE, val_file=other, val_every=3, proj_dir=str(tmp_path / "run"))
    result = fit(config)
    _, validation = samples.make(config, Dataset(documents), Dataset(other))
    expected, _ = plain_mean(load_model(base), [validation[i] for i in range(len(validation))], bool(mode))
    found = {line["step"]: line["val_loss"] for line in lines(tmp_path / "run") if "val_loss" in line}
    assert list(found) == [3, 4, 6, 8]
    assert list(found.values()) == pytest.approx([expected] * 4, rel=1e-5)
    assert result.val_loss == found[8]
    assert json.loads((tmp_path / "run/run.json").read_text())["validation"]["sha256"] == sha256(f"{other}.bin")
    runs = [fit(TrainConfig(**flags, val_file=path, proj_dir=str(tmp_path / f"{path[-5:]}-"))) for path in ("", other)]
    without, given = (read_tensors(run.checkpoint) for run in runs)
    assert all(torch.equal(without[key], given[key]) for key in without)


def test_changed_val_file(make_base, documents, other, tmp_path):
    flags = FLAGS | {
        "load_model": str(make_base()),
        "data_file": documents,
        "proj_dir": str(tmp_path / "run"),
        "val_file": other,
    }
    fit(TrainConfig(**flags, max_steps=2))
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("v_text_*"):
        (moved / path.name).write_bytes(path.read_bytes())
    flags["val_file"] = str(moved / "v_text_document")
    fit(TrainConfig(**flags, max_steps=4))  # same content, another path
    ids = (moved / "v_text_document.bin").read_bytes()
    (moved / "v_text_document.bin").write_bytes(ids[:-4] + b"\1\0\0\0")
    with pytest.raises(UserError, match="validation set"):
        fit(TrainConfig(**flags, max_steps=6))
    fit(TrainConfig(**flags | {"val_file": ""}, max_steps=6))  # allowed: training does not depend on it


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "v.jsonl",
            r"a .jsonl file. Convert it first: .*convert.* --input .*v.jsonl .*; then pass --val_file .*v_text_document",
        ),
        ("my v.csv", r"a .csv file. Convert it first: .*; then pass --val_file '.*my v_text_document'"),
        ("no", r"no such data \(.*no.idx: no such file\); pass the prefix of a binidx$"),
        ("folder", r"a folder. Convert it first"),
    ],
)
def test_val_file_that_is_no_binidx(make_base, documents, tmp_path, name, says):
    (tmp_path / "folder").mkdir()
    for file in ("v.jsonl", "my v.csv"):
        (tmp_path / file).write_text("text\n")
    flags = {"load_model": str(make_base()), "data_file": documents, "proj_dir": str(tmp_path / "run"), "ctx_len": 8}
    with pytest.raises(UserError, match=f"--val_file .*: {says}"):
        fit(TrainConfig(**flags, val_file=str(tmp_path / name)))


def test_invalid_val_file(make_base, documents, make_data, tmp_path):
    flags = FLAGS | {"load_model": str(make_base()), "data_file": documents, "proj_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match="is the training data"):
        fit(TrainConfig(**flags, val_file=documents))
    with pytest.raises(UserError, match=r"--val_file .*short: the data has 9 tokens"):
        fit(TrainConfig(**flags, val_file=make_data(9, name="short")))
    with pytest.raises(UserError, match=r"large\.bin: token id \d+ is outside the model's vocabulary of 50"):
        fit(TrainConfig(**flags, val_file=make_data(90, vocab=900, name="large")))
    assert not (tmp_path / "run").exists()


def test_training_and_validation_disjoint(documents):
    config = TrainConfig(**FLAGS, data_file=documents, val_split=0.2, doc_training=1)
    training, validation = samples.make(config, Dataset(documents))
    seen = [
        {tuple(x.tolist()) for x, *_ in (source.item(*source.sequential_window(i)) for i in range(source.per_pass))}
        for source in (training, validation.source)
    ]
    assert seen[0]
    assert seen[1]
    assert not seen[0] & seen[1]


def test_validation_does_not_affect_training(make_base, documents, tmp_path):
    common = {**FLAGS, "load_model": str(make_base()), "data_file": documents, "lora_dropout": 0.3, "val_split": 0.2}
    runs = [
        fit(LoRAConfig(**common, proj_dir=str(tmp_path / f"{every}"), val_every=every)).checkpoint for every in (0, 1)
    ]
    once, often = map(read_tensors, runs)
    assert all(torch.equal(once[key], often[key]) for key in once)


def test_two_processes_match_one_with_masked_targets(script, two_ranks, make_base, documents, tmp_path):
    base = make_base()
    flags = {
        "load_model": base,
        "data_file": documents,
        "doc_training": 1,
        "doc_reset": 1,
        "val_split": 0.2,
        "val_every": 1,
        "lr_init": 1e-3,
    }
    flags |= {
        "ctx_len": CTX,
        "epoch_steps": 5,
        "epoch_count": 1,
        "random_seed": 1,
        "accelerator": "cpu",
        "precision": "fp32",
    }
    common = [word for name, value in flags.items() for word in (f"--{name}", value)]
    script("finetune.py", *common, "--micro_bsz", 2, "--proj_dir", "one")
    two_ranks("finetune.py", *common, "--micro_bsz", 1, "--proj_dir", "two")
    one, two = (lines(tmp_path / name) for name in ("one", "two"))
    for key in ("loss", "val_loss", "targets"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-5), key
    weights = [read_tensors(tmp_path / name / "rwkv-0.pth") for name in ("one", "two")]
    for key in weights[0]:
        # fp32 means in different order, then Adam
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=1e-4, atol=1e-5, msg=key)


def test_step_without_targets(make_base, documents, tmp_path):
    tokens = len(Dataset(documents).tokens)
    mask_path(documents).write_bytes(bytes(tokens - 1) + b"\1")
    base = make_base()
    result = fit(
        TrainConfig(**FLAGS, load_model=str(base), data_file=documents, proj_dir=str(tmp_path / "run"), max_steps=1)
    )
    assert [(line["loss"], line["targets"]) for line in lines(tmp_path / "run")] == [(None, 0)]
    assert math.isnan(result.last_loss)  # a loss of 0 would be the best of the run
    before, after = read_tensors(base), read_tensors(result.checkpoint)
    assert all(torch.equal(before[key], after[key]) for key in before)


INVALID_FLAGS = [
    ({"doc_training": 1, "magic_prime": -1}, "use only one of them"),
    ({"min_ctx_len": 5}, "applies to --doc_training 1"),
    ({"doc_training": 1, "min_ctx_len": CTX + 1}, f"must not be greater than --ctx_len {CTX}"),
    ({"doc_sep": -2}, "must be a token id, or -1"),
    ({"doc_sep": 1 << 16}, r"--doc_sep 65536: no token of .* has this id"),
    ({"my_pile_shift": 8}, "--my_pile_shift 8 applies to prime sampling"),
    ({"val_split": 1.0}, "less than 1"),
    ({"val_every": 5}, "needs a validation set: pass --val_file, or --val_split"),
    ({"val_file": "v", "val_split": 0.5}, "both define the validation set"),
    ({"val_file": "v.jsonl"}, r"--val_file v.jsonl: no such data"),
    ({"val_file": "v", "data_type": "utf-8"}, "has its own vocabulary"),
    ({"val_file": "none"}, "none: no such data .*pass the prefix of a binidx$"),
    ({"val_split": 0.5, "val_samples": -1}, "must not be negative"),
    ({"val_split": 0.01}, "tokens for validation"),
    ({"chatml_mask": 1}, "--chatml_mask 1 finds no answer in it"),
]


@pytest.mark.parametrize(("flags", "message"), INVALID_FLAGS)
def test_invalid_flags(documents, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        fit(
            TrainConfig(
                **{
                    **FLAGS,
                    "n_layer": 1,
                    "version": "4",
                    "n_embd": 8,
                    "vocab_size": 50,
                    "data_file": documents,
                    "proj_dir": str(tmp_path / "run"),
                    **flags,
                }
            )
        )
    assert not (tmp_path / "run").exists()


def test_all_zero_mask(documents, tmp_path):
    mask_path(documents).write_bytes(bytes(len(Dataset(documents).tokens)))
    with pytest.raises(UserError, match="no token of the data contributes to the loss: its loss mask is all 0"):
        samples.make(TrainConfig(**FLAGS, data_file=documents), Dataset(documents))


def test_all_zero_mask_names_roles(write_jsonl):
    questions = write_jsonl(*({"messages": [{"role": "用户", "content": f"what is {i}?"}]} for i in range(9)))
    prefix = convert(ConvertConfig(input=str(questions), workers=1)).pairs[0][0]
    with pytest.raises(UserError, match=r"all 0, no message has the role assistant \(found: user 9\)"):
        samples.make(TrainConfig(**FLAGS, data_file=prefix), Dataset(prefix))
