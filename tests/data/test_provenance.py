"""Manifests of converted data, and the check of tokenizer against model vocabulary."""

import hashlib
import json
from pathlib import Path

import pytest

from rwkv.config import ConvertConfig, TrainConfig
from rwkv.data import provenance
from rwkv.data.binidx import Dataset, mask_path
from rwkv.data.convert.pipeline import convert
from rwkv.data.convert.shards import merge
from rwkv.data.inspection import format_report, inspect
from rwkv.errors import UserError
from rwkv.models.v4 import Sizes
from rwkv.train.data_source import open_data

CHAT = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}


def converted(source, prefix, **flags):
    flags = {"input": str(source), "output_prefix": str(prefix), "workers": 1, **flags}
    return convert(ConvertConfig(**flags)).pairs[0][0]


def train_on(prefix, vocab_size, load_model="base.pth"):
    return open_data(TrainConfig(data_file=prefix, load_model=load_model), Sizes(1, 8, vocab_size, 8, 32))


def test_manifest_contents(write_jsonl, tmp_path):
    source = write_jsonl(CHAT, CHAT)
    prefix = converted(source, tmp_path / "p")
    data, found = Dataset(prefix), json.loads(Path(f"{prefix}.json").read_bytes())
    assert found == provenance.load(data)
    assert (found["documents"], found["tokens"], found["counted"]) == (2, len(data.tokens), int(data.mask.sum()))
    assert found["tokenizer"] == {"name": "World", "vocab_size": 65536, "eod": 0, "sha256": None}
    stat = source.stat()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert found["sources"] == [
        {"path": str(source), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
    ]
    assert found["flags"]["append_eod"] is True
    assert "source:     tokenizer World (65,536 tokens), from" in format_report(inspect(data, 4, 1))


def test_missing_mask(write_jsonl, tmp_path):
    """Data whose mask was not copied with it is an error, not trained on as a whole."""
    prefix = converted(write_jsonl(CHAT), tmp_path / "p")
    mask_path(prefix).unlink()
    with pytest.raises(UserError, match=r"p_text_mask.bin: no such file, but .*p_text_document.json says .* 3 of 13"):
        train_on(prefix, 65536)
    assert any("p_text_mask.bin: no such file" in problem for problem in inspect(Dataset(prefix), 4, 1).problems)
    Path(f"{prefix}.json").unlink()  # the way to train on all tokens
    assert train_on(prefix, 65536).mask is None


def test_merged_manifest_equals_single_run(write_jsonl, tmp_path):
    source = write_jsonl(*[CHAT] * 9)
    whole = provenance.read(converted(source, tmp_path / "whole"))
    for i in range(2):
        converted(source, tmp_path / "parts", shard=f"{i}/2")
    merge(str(tmp_path / "parts"), False)
    assert provenance.read(tmp_path / "parts_text_document") == whole


@pytest.mark.parametrize("vocab_size", [50277, 50304, 260])
def test_world_data_with_other_model(write_jsonl, tmp_path, vocab_size):
    prefix = converted(write_jsonl({"text": "\x01\x02"}), tmp_path / "p")
    assert Dataset(prefix).tokens.max() < vocab_size  # every id would fit
    with pytest.raises(
        UserError,
        match=rf"was tokenised with World .* has a vocabulary of {vocab_size:,}.* with --tokenizer_type HFTokenizer",
    ):
        train_on(prefix, vocab_size)
    assert len(train_on(prefix, 65536)) == 1
    assert len(train_on(prefix, 65600)) == 1  # a World model with added tokens


def test_other_data_with_world_model(write_jsonl, tmp_path, byte_tokenizer):
    text = write_jsonl({"text": "Hell"})
    prefix = converted(text, tmp_path / "p", tokenizer_type="HFTokenizer", vocab_file=str(byte_tokenizer[0]))
    assert provenance.read(prefix)["tokenizer"]["sha256"] == hashlib.sha256(byte_tokenizer[0].read_bytes()).hexdigest()
    for load_model in ("base.pth", ""):
        with pytest.raises(
            UserError,
            match=r"tokenised with tokenizer.json .* World models.* Convert the text again, without --tokenizer_type",
        ):
            train_on(prefix, 65536, load_model)
    with pytest.raises(UserError, match=r"tokenised with tokenizer.json"):
        train_on(prefix, 50277)
    for vocab_size, load_model in ((259, "base.pth"), (320, "base.pth"), (5000, "")):  # padded; new
        assert len(train_on(prefix, vocab_size, load_model)) == 1
    Path(f"{prefix}.json").unlink()  # as written by upstream's tool
    assert len(train_on(prefix, 65536)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is corrupt"),
        (b'{"kind": "rwkv binidx", "format": 1}', "is corrupt"),
        (b'{"kind": "rwkv binidx", "format": 9}', "a manifest of version 9"),
        (b"[" * 100_000, "is corrupt"),
    ],
)
def test_corrupt_manifest(write_jsonl, tmp_path, content, message):
    prefix = converted(write_jsonl({"text": "a"}), tmp_path / "p")
    Path(f"{prefix}.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        train_on(prefix, 65536)
    assert any(message in problem for problem in inspect(Dataset(prefix), 4, 1).problems)


@pytest.mark.parametrize(
    "change", [{"tokenizer": ...}, {"counted": ...}, {"splits": "train"}, {"splits": {"used": "train"}}], ids=str
)
def test_manifest_with_invalid_entry(write_jsonl, tmp_path, change):
    """`...`: the entry is missing."""
    prefix = converted(write_jsonl({"text": "a"}), tmp_path / "p")
    path = Path(f"{prefix}.json")
    manifest = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not ...}))
    with pytest.raises(UserError, match="is corrupt"):
        train_on(prefix, 65536)
    assert any("is corrupt" in problem for problem in inspect(Dataset(prefix), 4, 1).problems)


def test_manifest_of_other_data(write_jsonl, tmp_path):
    prefix = converted(write_jsonl({"text": "a"}), tmp_path / "p")
    other = converted(write_jsonl({"text": "a"}, {"text": "b"}), tmp_path / "q")
    for end in (".bin", ".idx"):
        Path(f"{prefix}{end}").write_bytes(Path(f"{other}{end}").read_bytes())
    with pytest.raises(UserError, match=r"p_text_document.json: describes 1 documents .* contains 2"):
        train_on(prefix, 65536)


def test_verify_takes_flags_from_manifest(script, write_jsonl, tmp_path, byte_tokenizer):
    """inspect --verify takes keys, encoding, split, lines and tokenizer from the manifest."""
    (tmp_path / "in").mkdir()
    write_jsonl({"title": "donâ€™t", "text": "b"}, {"no": 1}, name="in/train.jsonl")
    write_jsonl({"title": "c", "text": "d"}, name="in/test.jsonl")
    (tmp_path / "in/train.txt").write_bytes("天地玄黄，宇宙洪荒。\n日月盈昃".encode("gbk"))
    flags = {
        "jsonl_keys": "text,title",
        "on_error": "skip",
        "split_lines": True,
        "encoding": "gbk",
        "ftfy": True,
        "split": "train",
    }
    converted(tmp_path / "in", tmp_path / "p", **flags)
    for key in ("text", "title"):
        printed = script(
            "inspect_data.py", "--data_file", f"p_{key}_document", "--verify", tmp_path / "in", "--ctx_len", 2
        ).stdout
        assert "verified:   all 3 documents" in printed
        assert "splits: train (omitted: test)" in printed
    converted(
        tmp_path / "in/test.jsonl", tmp_path / "q", tokenizer_type="HFTokenizer", vocab_file=str(byte_tokenizer[0])
    )
    arguments = ("--data_file", "q_text_document", "--verify", tmp_path / "in/test.jsonl", "--ctx_len", 1, "--json")
    # only too short for a context
    found = json.loads(script("inspect_data.py", *arguments, status=1).stdout)
    assert (found["verified"], found["samples"], len(found["problems"])) == (1, ["d<|endoftext|>"], 1)


def test_stale_files_removed(write_jsonl, tmp_path):
    prefix = converted(write_jsonl(CHAT), tmp_path / "p")
    assert mask_path(prefix).exists()
    converted(write_jsonl({"text": "a"}), tmp_path / "p", force=True)
    assert not mask_path(prefix).exists()
    assert Dataset(prefix).mask is None
    assert provenance.load(Dataset(prefix))["counted"] is None


def test_folder_skips_converter_output(write_jsonl, tmp_path):
    write_jsonl({"text": "a"})
    for _ in range(2):
        prefix = converted(tmp_path, tmp_path / "p", force=True)
    assert [Path(source["path"]).name for source in provenance.read(prefix)["sources"]] == ["text.jsonl"]
