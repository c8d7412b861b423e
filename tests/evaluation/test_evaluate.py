"""scripts/evaluate.py: models and adapters in one table, inputs, errors before work."""

import csv
import gzip
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F

from rwkv import checkpoint
from rwkv.checkpoint import load_model
from rwkv.cli import parse
from rwkv.config import ConvertConfig, EvaluateConfig, LoRAConfig
from rwkv.data import progress_bar
from rwkv.data.convert import pipeline
from rwkv.data.token_stream import Stream, split_pairs
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError
from rwkv.evaluation import inputs, models, table
from rwkv.evaluation.scores import Score
from rwkv.train.fit import fit
from scripts import evaluate
from tests.models.test_v4 import transformers_model

TEXTS = ["Hello, world.", "naïve 二 texts\nwith a second line", "x", "The same. " * 12]


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    """A base of the World vocabulary, a run that tuned an adapter on it, and files to score."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = make_model(n_layer=1, n_embd=8, vocab_size=65536)
    checkpoint.save_model(folder / "base.pth", model, {})
    for name, sources in (("a", "xyxy"), ("b", "xxyy")):
        records = [{"text": text, "source": source} for text, source in zip(TEXTS, sources, strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "many.jsonl").write_text("".join(json.dumps({"text": "a", "number": i}) + "\n" for i in range(201)))
    chats = [
        {"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}"}]}
        for i in range(12)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    pipeline.convert(ConvertConfig(input=str(folder / "chat.jsonl"), output_prefix=str(folder / "chat"), workers=1))
    flags = {"ctx_len": 16, "micro_bsz": 2, "epoch_steps": 3, "epoch_count": 1, "random_seed": 1, "accelerator": "cpu"}
    flags |= {"precision": "fp32", "lr_init": 1e-2, "lr_final": 1e-2, "val_split": 0.3}
    data = str(folder / "chat_text_document")
    fit(LoRAConfig(**flags, load_model=str(folder / "base.pth"), data_file=data, proj_dir=str(folder / "run")))
    return folder


def by_transformers(folder, texts):
    """(tokens, nats) of texts, each after EOD and with EOD as its last token."""
    model, tokenizer = transformers_model(load_model(folder / "base.pth")).eval(), WorldTokenizer()
    tokens, nats = 0, 0.0
    for text in texts:
        ids = torch.tensor([[0, *tokenizer.encode(text), 0]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        tokens, nats = tokens + ids.numel() - 1, nats + float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return tokens, nats


@pytest.fixture
def evaluated(tmp_path, capsys):
    """Run the script in this process; returns what it printed, and its JSON."""

    def run(*flags):
        config = parse(EvaluateConfig, "", ["--output", str(tmp_path / "out.json"), *map(str, flags)])
        evaluate.main(config)
        return capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())

    return run


def test_text_against_transformers(evaluated, folder):
    printed, found = evaluated("--model", folder / "base.pth", "--data_file", f"{folder}/a.jsonl,{folder}/b.jsonl")
    tokens, nats = by_transformers(folder, TEXTS)
    (model,) = found["models"]
    assert list(model["sources"]) == ["a.jsonl", "b.jsonl"]
    for name in ("a.jsonl", "b.jsonl"):
        one = model["sources"][name]
        assert (one["documents"], one["tokens"]) == (4, tokens)
        assert one["nats"] == pytest.approx(nats, rel=1e-5)  # fp32, other order of sums
        assert one["bytes"] == sum(len(text.encode()) for text in TEXTS)
        assert one["bits_per_byte"] == pytest.approx(nats / math.log(2) / one["bytes"], rel=1e-5)
        assert one["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert model["all"]["tokens"] == 2 * tokens
    assert f"{nats / tokens:.3f}"[:-1] in printed
    assert printed.count("\n") == 6  # a line about the loss, a blank one, the header, three rows


def test_progress(folder, monkeypatch, capsys):
    monkeypatch.setattr(progress_bar, "LINE_SECONDS", 0)  # a line at every update
    evaluate.main(EvaluateConfig(model=str(folder / "base.pth"), data_file=str(folder / "a.jsonl")))
    printed = capsys.readouterr()
    assert re.search(r"^base\.pth, a\.jsonl: 100%, .* tokens/s$", printed.err, re.MULTILINE)
    assert "tokens/s" not in printed.out


def test_field_of_the_records(evaluated, folder):
    _, found = evaluated("--model", folder / "base.pth", "--data_file", folder / "a.jsonl", "--by", "source")
    sources = found["models"][0]["sources"]
    for name, texts in (("x", TEXTS[::2]), ("y", TEXTS[1::2])):
        tokens, nats = by_transformers(folder, texts)
        assert (sources[name]["tokens"], sources[name]["nats"]) == (tokens, pytest.approx(nats, rel=1e-5))


def write_as(kind, folder):
    """The records of TEXTS with sources x, y, x, y in a file of this kind; returns its name."""
    rows = [{"text": text, "source": source} for text, source in zip(TEXTS, "xyxy", strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = folder / f"texts.{kind}"
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
            out.write(lines)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with open(path, "w", newline="") as out:
            writer = csv.DictWriter(out, ["source", "text"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.name


def documents(one):
    """The texts of an input."""
    starts = one.stream.document_starts()
    return [WorldTokenizer().decode(one.stream.ids(a, b)) for a, b in itertools.pairwise(starts.tolist())]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "json", "csv", "parquet"])
def test_formats_of_files(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    name = write_as(kind, tmp_path)
    (whole,) = inputs.of_files(EvaluateConfig(data_file=name), tmp_path / "whole")
    assert (whole.name, documents(whole)) == (name, TEXTS)
    (tmp_path / name).rename("unnamed")
    config = EvaluateConfig(data_file="unnamed", input_format=kind.split(".")[0], by="source")
    inputs.check(config)
    found = inputs.of_files(config, tmp_path / "divided")
    assert [(one.name, documents(one)) for one in found] == [("x", TEXTS[::2]), ("y", TEXTS[1::2])]


def test_field_of_chats_in_two_files(tmp_path):
    """Skipped records have no value, values that are not texts are shown as JSON, and a value in
    two files is one row.
    """
    for name, levels in (("a", [1, None]), ("b", [1])):
        records = [
            {
                "messages": [{"role": "user", "content": f"Q{name}"}, {"role": "assistant", "content": "A"}],
                "level": level,
            }
            for level in levels
        ]
        records.insert(1, {"messages": [], "level": 1})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = EvaluateConfig(data_file=f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", by="level")
    one, null = inputs.of_files(config, tmp_path / "out")
    turn = "User: Q{}\n\nAssistant: A\n\n"
    assert (one.name, documents(one)) == ("1", [turn.format("a"), turn.format("b")])
    assert (null.name, documents(null)) == ("null", [turn.format("a")])
    counted = one.stream.read(0, len(one.stream)).loss_mask.sum()
    assert counted == 2 * (len(WorldTokenizer().encode(" A\n\n")) + 1)


def test_base_and_adapter_on_the_validation_set_of_a_run(evaluated, folder):
    """The validation documents, of which only the answers are scored."""
    flags = ["--model", folder / "base.pth", "--lora", folder / "run/rwkv-0.pth", "--run", folder / "run"]
    printed, found = evaluated(*flags)
    base, tuned = (model["all"] for model in found["models"])
    assert found["models"][1]["name"] == "+ rwkv-0.pth"
    validation = inputs.of_run(json.loads((folder / "run/run.json").read_text()), folder / "run")[0]
    assert (
        0 < base["tokens"] == tuned["tokens"] == int(validation.stream.read(0, len(validation.stream)).loss_mask.sum())
    )
    assert base["documents"] < 12
    assert tuned["loss"] < base["loss"]
    assert f"{tuned['loss'] - base['loss']:+.4f}" in printed
    _, again = evaluated(
        "--model", folder / "base.pth", "--data_file", folder / "chat_text_document", "--val_split", 0.3
    )
    assert again["models"][0]["all"] == base


@pytest.mark.parametrize("name", ["chat_text_document.bin", "chat_text_document.idx", "chat_text_mask.bin"])
def test_data_of_a_run_changed_since(folder, tmp_path, monkeypatch, name):
    """Another index selects other documents for validation, another mask other tokens."""
    for path in folder.glob("chat_text*"):
        shutil.copy(path, tmp_path)
    manifest = json.loads((folder / "run/run.json").read_text())
    manifest["data"]["prefix"] = "chat_text_document"
    monkeypatch.chdir(tmp_path)
    assert inputs.of_run(manifest, Path("run"))
    changed = bytearray((tmp_path / name).read_bytes())
    if name.endswith(".idx"):
        (tmp_path / "other.jsonl").write_text('{"text": "' + "a" * 5000 + '"}\n')
        pipeline.convert(ConvertConfig(input="other.jsonl", output_prefix="chat", workers=1, force=True))
        shutil.copy(folder / "chat_text_document.bin", tmp_path)
    else:
        changed[0] ^= 1
        (tmp_path / name).write_bytes(changed)
    with pytest.raises(UserError, match="has changed since the run in run|the files do not match"):
        inputs.of_run(manifest, Path("run"))


def test_data_of_a_moved_run(folder, tmp_path):
    """A run's converted copy of a .jsonl file is in its folder."""
    for path in folder.glob("chat_text*"):
        shutil.copy(path, tmp_path)
    manifest = json.loads((folder / "run/run.json").read_text())
    manifest["data"]["prefix"] = "/elsewhere/chat_text_document"
    assert inputs.of_run(manifest, tmp_path)[0].data.prefix == tmp_path / "chat_text_document"


def test_data_of_another_vocabulary(folder, make_base):
    """All ids are valid, but other tokens of the model."""
    config = EvaluateConfig(model=str(make_base(vocab_size=50277)), data_file=str(folder / "chat_text_document"))
    with pytest.raises(UserError, match="was tokenised with .*, but the model has a vocabulary of 50,277"):
        models.check_vocabularies(models.check(config), inputs.of_files(config, None))


def test_tuned_state_beside_its_base(evaluated, folder, tmp_path):
    """As --lora, with the scores of a model that has the state in its file."""
    state = {"blocks.0.att.time_state": torch.tensor([[3.0] * 8, [1.0] * 8, [0.0] * 8])}
    torch.save(state, tmp_path / "state.pth")
    tensors = checkpoint.read_tensors(folder / "base.pth")
    torch.save({**tensors, **state}, tmp_path / "merged.pth")
    data = ["--data_file", folder / "a.jsonl"]
    _, found = evaluated("--model", folder / "base.pth", "--lora", tmp_path / "state.pth", *data)
    _, merged = evaluated("--model", tmp_path / "merged.pth", *data)
    base, tuned = (model["all"] for model in found["models"])
    assert tuned == merged["models"][0]["all"]
    assert tuned["tokens"] == base["tokens"] - 4  # nothing predicts the first token of a document


def test_preference_pairs(evaluated, folder, tmp_path):
    """Chosen and rejected answers are separate rows, also of the validation set of a run."""
    records = [{"prompt": f"Q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pipeline.convert(ConvertConfig(input=str(tmp_path / "pairs.jsonl"), output_prefix=str(tmp_path / "p"), workers=1))
    prefix = str(tmp_path / "p_text_document")
    every = inputs.of_files(EvaluateConfig(data_file=f"{prefix},{tmp_path}/pairs.jsonl"), tmp_path / "out")
    assert [one.name for one in every[:2]] == ["p_text_document, chosen", "p_text_document, rejected"]
    assert documents(every[0]) == [f"User: Q{i}\n\nAssistant: yes {i}\n\n" for i in range(20)] == documents(every[2])
    assert documents(every[1]) == [f"User: Q{i}\n\nAssistant: no\n\n" for i in range(20)] == documents(every[3])
    by = inputs.of_files(EvaluateConfig(data_file=f"{tmp_path}/pairs.jsonl", by="rejected"), tmp_path / "by")
    assert [(one.name, documents(one)) for one in by] == [
        (f"no, {side}", documents(one)) for side, one in zip(("chosen", "rejected"), every, strict=False)
    ]
    flags = {"val_split": 0.3, "doc_sep": 0, "doc_reset": 1, "ctx_len": 16}
    held = inputs.of_run({"flags": flags, "data": {"prefix": prefix}}, tmp_path)
    expected = split_pairs(every[0].data, 0.3)[1]
    whole = inputs.Input("", held[0].data, Stream(held[0].data, expected))
    assert sorted([*documents(held[0]), *documents(held[1])]) == sorted(documents(whole))
    assert len(documents(held[0])) == len(documents(held[1])) > 1


def test_windows(evaluated, folder):
    _, found = evaluated("--model", folder / "base.pth", "--data_file", folder / "a.jsonl", "--ctx_len", 4)
    model, tokenizer, nats = load_model(folder / "base.pth").eval(), WorldTokenizer(), 0.0
    for text in TEXTS:
        ids = torch.tensor([0, *tokenizer.encode(text), 0])
        for begin in range(0, len(ids) - 1, 4):
            part = ids[begin : begin + 5]
            with torch.no_grad():
                nats += float(F.cross_entropy(model(part[None, :-1])[0][0], part[1:], reduction="sum"))
    assert found["models"][0]["all"]["nats"] == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "nothing to evaluate: pass --data_file, --run or --tasks"),
        ({"data_file": "a.jsonl", "run": "run"}, "pass only one of them"),
        ({"data_file": "a.jsonl", "val_split": 0.1}, "--val_split divides a binidx"),
        ({"data_file": "chat_text_document", "by": "source"}, "--by source is a field of records, which a binidx"),
        ({"data_file": "a.jsonl", "by": "kind"}, "a.jsonl, line 1: has no field kind"),
        ({"data_file": "many.jsonl", "by": "number"}, "--by: the field has 201 different values, more than 200"),
        ({"data_file": "a.jsonl", "model": ""}, "--model is missing"),
        (
            {"data_file": "a.jsonl", "model": "base.pth,base.pth", "lora": "run/rwkv-0.pth"},
            "--lora with several models",
        ),
        ({"data_file": "a.jsonl", "lora": "base.pth"}, "base.pth: not a LoRA adapter"),
        ({"data_file": "nothing.txt"}, "nothing.txt: no such file, nor a binidx"),
        ({"data_file": "a.jsonl", "micro_bsz": 0}, "--micro_bsz must be at least 1"),
        ({"data_file": "chat_text_document", "mask": "none"}, "--mask none is for files that are converted"),
        ({"run": "run", "input_format": "txt"}, "--input_format txt is for files that are converted"),
        ({"data_file": "a.jsonl", "limit": 5}, "--limit 5 is for --tasks"),
        ({"data_file": "a.jsonl", "output": "results"}, "--output results: pass the name of a .json file"),
    ],
)
def test_rejected(folder, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    config = EvaluateConfig(**{"model": "base.pth", **flags})

    def check():
        models.check(config)
        inputs.check(config)
        inputs.of_files(config, tmp_path)

    with pytest.raises(UserError, match=message):
        check()


def test_output_is_checked_before_the_work(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "file").touch()
    monkeypatch.setattr(models, "evaluate", lambda *arguments: pytest.fail("evaluated"))
    config = EvaluateConfig(model="base.pth", data_file="a.jsonl", output=str(tmp_path / "file/out.json"))
    with pytest.raises(UserError, match=r"out\.json: cannot be written: its folder is a file"):
        evaluate.main(config)


def test_unknown_vocabulary_has_no_bytes(make_base, make_data):
    base, data = make_base(), make_data(60)
    config = EvaluateConfig(model=str(base), data_file=data)
    result = models.evaluate(config, models.check(config)[0], inputs.of_files(config, None))
    assert result.total.tokens == 60
    assert result.total.bits_per_byte is None
    assert "–" in table.losses([result])


def test_columns_align_wide_characters():
    one, two = table.Evaluated("二", "m"), table.Evaluated("+ x", "m", "x")
    one.scores["数据"], two.scores["数据"] = Score(1, 2, 3.0, 4, 1), Score(1, 2, 4.0, 4, 0)
    lines = table.losses([one, two]).splitlines()
    assert lines[2].endswith("+0.5000")
    ends = [
        line.index(value) + len(value) + sum(x > "\u2fff" for x in line)
        for line, value in zip(lines[1:], ("1.5000", "2.0000"), strict=True)
    ]
    assert ends[0] == ends[1]
    assert np.isnan(Score().loss)
