"""--sample_every: when samples are written, that they are the model's, and that training is not
affected.
"""

import dataclasses
import json
from unittest import mock

import pytest
import torch

from rwkv.adapters import state
from rwkv.checkpoint import load_model, read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.data.binidx import Dataset, mask_path
from rwkv.data.binidx_writer import writer
from rwkv.data.decoding import Numbers, WorldTokenizer, pieces, vocabulary_of
from rwkv.data.token_stream import Stream
from rwkv.errors import UserError
from rwkv.train.callbacks import sampling
from rwkv.train.callbacks.sampling import prompts
from rwkv.train.fit import fit
from tests.train.small_runs import SMALL, lines

# dropout and accumulation: random numbers are drawn in every step, and steps are not batches
FLAGS = {"dropout": 0.1, "accumulate_grad_batches": 2, "epoch_steps": 4, "epoch_count": 3, "lr_init": 1e-2}
TOKENS = 12


@pytest.fixture(autouse=True, scope="module")
def _short_samples():
    with mock.patch.object(sampling, "TOKENS", TOKENS):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "d"
    with writer(prefix) as out:
        for i in range(30):
            out.add([(i * j * j + j) % 49 + 1 for j in range(12)] + [0])
    return str(prefix)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A run without and one with samples: their config."""
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(**SMALL | FLAGS, data_file=data, proj_dir=str(folder / "without"))
    sampled = dataclasses.replace(config, proj_dir=str(folder / "with"), sample_every=2)
    fit(config), fit(sampled)
    return config, sampled


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_losses_are_equal_with_and_without(runs):
    without, sampled = (config.folder for config in runs)
    assert [(x["loss"], x["grad_norm"]) for x in lines(sampled)] == [
        (x["loss"], x["grad_norm"]) for x in lines(without)
    ]
    ours, theirs = read_tensors(sampled / "rwkv-2.pth"), read_tensors(without / "rwkv-2.pth")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [line["step"] for line in samples(sampled)] == [0, 0, 0, 2, 2, 2, 4, 4, 4, 6, 6, 6]


def test_samples_are_the_models(runs, data):
    """The last samples are greedy continuations, computed here without a state."""
    folder = runs[1].folder
    model, found = load_model(folder / "rwkv-2.pth").eval(), samples(folder)[-3:]
    for line in found:
        ids, expected = [0, *map(int, line["prompt"].split())], []
        while len(expected) < TOKENS:
            with torch.no_grad():
                token = int(model(torch.tensor([ids]))[0][0, -1].argmax())
            if token == 0:
                break
            expected.append(token)
            ids.append(token)
        assert line["text"] == Numbers().decode(expected)
        whole = f"{line['prompt']} {line['reference']}"
        stored = Dataset(data)
        assert whole in [Numbers().decode(stored.document(i).tolist()[:-1]) for i in range(30)]


def test_resumed_run_has_the_same_samples(runs, tmp_path):
    config = dataclasses.replace(runs[1], proj_dir=str(tmp_path / "run"))
    for steps in (1, 3, 4):
        fit(dataclasses.replace(config, max_steps=steps))
    with open(tmp_path / "run/samples.jsonl", "a") as file:  # by a run that was killed after its last state
        file.write('{"step": 5, "prompt": "", "text": "late", "reference": ""}\n{"step": 6, "pro')
    fit(config)
    expected = samples(runs[1].folder)
    # a run that ends at step 1 or 3 has samples there, too
    assert [line for line in samples(tmp_path / "run") if line["step"] % 2 == 0] == expected
    assert {line["step"] for line in samples(tmp_path / "run")} == {0, 1, 2, 3, 4, 6}


def test_prompts_are_questions(tmp_path):
    tokenizer = WorldTokenizer()
    with writer(tmp_path / "chat_text_document") as out:
        masks = b""
        for i in range(9):
            asked, answer = tokenizer.encode(f"User: Why {i}?\n\nAssistant:"), [*tokenizer.encode(" Because."), 0]
            out.add(asked + answer)
            masks += bytes(len(asked)) + b"\1" * len(answer)
    mask_path(tmp_path / "chat_text_document").write_bytes(masks)
    data = Dataset(tmp_path / "chat_text_document")
    assert vocabulary_of(data, 65536).name == "World"
    found = prompts(TrainConfig(sample_every=1), Stream(data), tokenizer)
    assert len(found) == 3
    assert all(x.text.startswith("User: Why") and x.text.endswith("Assistant:") for x in found)
    assert {x.reference for x in found} == {" Because."}
    asked = prompts(TrainConfig(sample_ask="A? | 二?"), Stream(data), tokenizer)
    assert [x.text for x in asked] == ["User: A?\n\nAssistant:", "User: 二?\n\nAssistant:"]


def test_pieces_are_whole_characters():
    tokenizer = WorldTokenizer()
    text = "naïve 😀𓀀 done"
    ids = tokenizer.encode(text)
    found = pieces(ids, tokenizer)
    assert "".join(piece for piece, _ in found) == text
    assert [i for _, group in found for i in group] == ids
    assert any(len(group) > 1 for _, group in found)  # a rare character is several tokens
    broken = pieces(tokenizer.encode("𓀀")[:1], tokenizer)
    assert [text for text, _ in broken] == ["�"]


def test_lora_in_bf16(make_base, data, tmp_path):
    """A base stored in bf16, under autocast."""
    flags = {key: value for key, value in SMALL.items() if key not in ("n_layer", "n_embd", "vocab_size")}
    flags |= {"precision": "bf16", "max_steps": 2, "sample_every": 1, "lora_dropout": 0.1}
    fit(LoRAConfig(**flags, load_model=str(make_base()), data_file=data, proj_dir=str(tmp_path / "run")))
    assert [line["step"] for line in samples(tmp_path / "run")] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sample_ask": "Why?"}, "--sample_ask needs --sample_every N"),
        ({"sample_ask": "Why?", "sample_every": 1}, "tokenizer of the data is unknown.*omit --sample_ask"),
        ({"sample_every": -1}, "--sample_every must not be negative"),
        (
            {"sample_every": 1, "strategy": "deepspeed_stage_3"},
            "no process has all weights.*deepspeed_stage_2|DeepSpeed",
        ),
    ],
)
def test_rejected(data, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        fit(TrainConfig(**SMALL | flags, data_file=data, proj_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_tuned_state_replaces_eod(make_model):
    model = make_model().eval()
    for expected in ([0, 5, 6], [5, 6]):
        with mock.patch.object(model, "hidden", side_effect=model.hidden) as hidden:
            sampling.continuation(model, [5, 6], 0, 1)
        assert hidden.call_args.args[0].tolist() == [expected]
        state.attach(model)
