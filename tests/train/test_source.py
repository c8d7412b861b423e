"""Upstream's other kinds of data become binidx on the way: characters, arrays of ids, sums."""

import json

import numpy as np
import pytest

from rwkv.checkpoint import read_manifest
from rwkv.config import TrainConfig
from rwkv.data import binidx
from rwkv.data.binidx import Dataset
from rwkv.errors import UserError
from rwkv.train.fit import fit

FLAGS = {
    "n_layer": 1,
    "n_embd": 8,
    "ctx_len": 8,
    "micro_bsz": 2,
    "epoch_steps": 2,
    "epoch_count": 1,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "fp32",
}


@pytest.mark.parametrize("kind", ["utf-8", "utf-16le"])
def test_the_characters_of_a_text_are_its_tokens(kind, tmp_path):
    text = "Ein Käfig ging\r\neinen Vogel suchen. 鳥 🐦\n" * 3
    (tmp_path / "t.txt").write_bytes(text.encode(kind))
    flags = {**FLAGS, "data_type": kind, "data_file": str(tmp_path / "t.txt"), "proj_dir": str(tmp_path / "run")}
    fit(TrainConfig(**flags, max_steps=1))
    read = text.replace("\r\n", "\n")  # as Python reads text, upstream's way
    words = sorted(set(read))
    assert json.loads((tmp_path / "run/vocab.json").read_text(encoding="utf-8")) == {str(i): word for i, word in enumerate(words)}
    data = Dataset(tmp_path / "run/data_text_document")
    assert [words[i] for i in data.tokens] == list(read)
    assert len(data) == 1
    result = fit(TrainConfig(**flags))  # goes on, with the same data
    assert result.steps == 2
    assert read_manifest(result.checkpoint)["sizes"]["vocab_size"] == len(words)
    other = {**flags, "proj_dir": str(tmp_path / "other"), "load_model": str(result.checkpoint)}
    (tmp_path / "t.txt").write_bytes("other".encode(kind))
    with pytest.raises(UserError, match=f"has a vocabulary of {len(words)}, and --data_type {kind} makes one of the text's 5 characters"):
        fit(TrainConfig(**{**other, "n_layer": 0, "n_embd": 0}))


def test_an_array_of_ids_is_a_stream(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50277, 300)
    np.save(tmp_path / "train.npy", ids)
    flags = {
        **FLAGS,
        "data_type": "numpy",
        "data_file": str(tmp_path / "train.npy"),
        "vocab_size": 50277,
        "proj_dir": str(tmp_path / "run"),
    }
    fit(TrainConfig(**flags))
    data = Dataset(tmp_path / "run/data_text_document")
    assert (data.tokens.dtype, data.tokens.tolist(), len(data)) == (np.uint16, ids.tolist(), 1)


def test_dummy_data_are_right_sums(tmp_path):
    fit(TrainConfig(**FLAGS, data_type="dummy", proj_dir=str(tmp_path / "run")))
    words = json.loads((tmp_path / "run/vocab.json").read_text())
    assert set(words.values()) == set("0123456789+=.")
    text = "".join(words[str(i)] for i in Dataset(tmp_path / "run/data_text_document").tokens[:40_000])
    sums = text.strip(".").split("..")[:-1]
    assert len(sums) > 2000
    assert all(int(a) + int(b) == int(c) for a, b, c in (one.replace("+", "=").split("=") for one in sums))


def test_a_stream_longer_than_an_index_can_count_is_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(binidx, "_LONGEST", 10)
    with binidx.writer(tmp_path / "d") as out:
        out.add_stream(np.arange(begin, end) for begin, end in ((0, 4), (4, 4), (4, 33), (33, 40)))
    data = Dataset(tmp_path / "d")
    assert data.tokens.tolist() == list(range(40))
    assert list(data.sizes) == [10, 10, 10, 10]


def test_processes_that_a_launcher_started_want_a_binidx(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # as torchrun sets it
    with pytest.raises(UserError, match="text.jsonl: a launcher has started all processes.*scripts/convert.py"):
        fit(TrainConfig(**FLAGS, devices=2, data_file=str(write_jsonl({"text": "x" * 99})), proj_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"data_type": "uint16"}, "uint16 is not one of binidx, numpy, .*--doc_training 1"),
        ({"data_type": "wds_img"}, "images"),
        ({"data_type": "utf8"}, "convert it"),
        ({"data_type": "utf-8", "vocab_size": 50277}, "--vocab_size 50277, and .* has 3 different characters"),
        ({"data_type": "utf-16le"}, "is not utf-16le"),
        ({"data_type": "utf-8", "data_file": "none"}, "none: No such file"),
        ({"data_type": "utf-8", "data_file": ""}, "--data_file is missing"),
        ({"data_type": "numpy"}, "not a .npy file"),
        ({"data_type": "utf-8", "my_pile_stage": 3}, "wants a binidx"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(tmp_path, flags, complaint):
    (tmp_path / "t").write_bytes(b"abc" * 11)
    with pytest.raises(UserError, match=complaint):
        fit(TrainConfig(**{**FLAGS, "data_file": str(tmp_path / "t"), "proj_dir": str(tmp_path / "run"), **flags}))
    assert not (tmp_path / "run").exists()
    np.save(tmp_path / "two.npy", np.zeros((2, 2)))
    with pytest.raises(UserError, match=r"holds float64 \[2, 2\]"):
        fit(TrainConfig(**FLAGS, data_type="numpy", data_file=str(tmp_path / "two.npy"), proj_dir=str(tmp_path / "run")))
