"""Upstream's other data types are converted to binidx: text, numpy arrays, dummy data."""

import json

import numpy as np
import pytest

from rwkv.checkpoint import read_manifest
from rwkv.config import TrainConfig
from rwkv.data import binidx_writer
from rwkv.data.binidx import Dataset
from rwkv.errors import UserError
from rwkv.train.fit import fit
from tests.train.small_runs import ONE_LAYER


@pytest.mark.parametrize("kind", ["utf-8", "utf-16le"])
def test_text_characters(kind, tmp_path):
    text = "Ein Käfig ging\r\neinen Vogel suchen. 鳥 🐦\n" * 3
    (tmp_path / "t.txt").write_bytes(text.encode(kind))
    flags = {**ONE_LAYER, "data_type": kind, "data_file": str(tmp_path / "t.txt"), "proj_dir": str(tmp_path / "run")}
    fit(TrainConfig(**flags, max_steps=1))
    read = text.replace("\r\n", "\n")  # as Python's text mode does upstream
    characters = sorted(set(read))
    assert json.loads((tmp_path / "run/vocab.json").read_text(encoding="utf-8")) == {
        str(i): character for i, character in enumerate(characters)
    }
    data = Dataset(tmp_path / "run/data_text_document")
    assert [characters[i] for i in data.tokens] == list(read)
    assert len(data) == 1
    result = fit(TrainConfig(**flags))  # resumes with the same data
    assert result.steps == 2
    assert read_manifest(result.checkpoint)["sizes"]["vocab_size"] == len(characters)
    other = {**flags, "proj_dir": str(tmp_path / "other"), "load_model": str(result.checkpoint)}
    (tmp_path / "t.txt").write_bytes("other".encode(kind))
    with pytest.raises(
        UserError,
        match=f"its vocabulary has {len(characters)} tokens, but --data_type {kind} uses one of the text's 5 characters",
    ):
        fit(TrainConfig(**{**other, "n_layer": 0, "n_embd": 0}))


def test_numpy_array(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50277, 300)
    np.save(tmp_path / "train.npy", ids)
    flags = {
        **ONE_LAYER,
        "data_type": "numpy",
        "data_file": str(tmp_path / "train.npy"),
        "vocab_size": 50277,
        "proj_dir": str(tmp_path / "run"),
    }
    fit(TrainConfig(**flags))
    data = Dataset(tmp_path / "run/data_text_document")
    assert (data.tokens.dtype, data.tokens.tolist(), len(data)) == (np.uint16, ids.tolist(), 1)


def test_dummy_data(tmp_path):
    fit(TrainConfig(**ONE_LAYER, data_type="dummy", proj_dir=str(tmp_path / "run")))
    vocabulary = json.loads((tmp_path / "run/vocab.json").read_text())
    assert set(vocabulary.values()) == set("0123456789+=.")
    text = "".join(vocabulary[str(i)] for i in Dataset(tmp_path / "run/data_text_document").tokens[:40_000])
    sums = text.strip(".").split("..")[:-1]
    assert len(sums) > 2000
    assert all(int(a) + int(b) == int(c) for a, b, c in (term.replace("+", "=").split("=") for term in sums))


def test_long_stream_is_split(tmp_path, monkeypatch):
    monkeypatch.setattr(binidx_writer, "_MAX_DOCUMENT", 10)
    with binidx_writer.writer(tmp_path / "d") as out:
        out.add_stream(np.arange(begin, end) for begin, end in ((0, 4), (4, 4), (4, 33), (33, 40)))
    data = Dataset(tmp_path / "d")
    assert data.tokens.tolist() == list(range(40))
    assert list(data.sizes) == [10, 10, 10, 10]


def test_no_conversion_under_launcher(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # as torchrun sets it
    with pytest.raises(
        UserError, match="text.jsonl: cannot be converted in a run started by a launcher.*scripts/convert.py"
    ):
        fit(
            TrainConfig(
                **ONE_LAYER, devices=2, data_file=str(write_jsonl({"text": "x" * 99})), proj_dir=str(tmp_path / "run")
            )
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data_type": "uint16"}, "uint16 is not one of binidx, numpy, .*--doc_training 1"),
        ({"data_type": "wds_img"}, "image models"),
        ({"data_type": "utf8"}, "convert it"),
        ({"data_type": "utf-8", "vocab_size": 50277}, "--vocab_size 50277: .* has 3 different characters"),
        ({"data_type": "utf-16le"}, "is not utf-16le"),
        ({"data_type": "utf-8", "data_file": "none"}, "none: No such file"),
        ({"data_type": "utf-8", "data_file": ""}, "--data_file is missing"),
        ({"data_type": "numpy"}, "not a .npy file"),
        ({"data_type": "utf-8", "my_pile_stage": 3}, "needs a binidx"),
    ],
    ids=str,
)
def test_invalid_data(tmp_path, flags, message):
    (tmp_path / "t").write_bytes(b"abc" * 11)
    with pytest.raises(UserError, match=message):
        fit(TrainConfig(**{**ONE_LAYER, "data_file": str(tmp_path / "t"), "proj_dir": str(tmp_path / "run"), **flags}))
    assert not (tmp_path / "run").exists()
    np.save(tmp_path / "two.npy", np.zeros((2, 2)))
    with pytest.raises(UserError, match=r"an array of float64 \[2, 2\]"):
        fit(
            TrainConfig(
                **ONE_LAYER, data_type="numpy", data_file=str(tmp_path / "two.npy"), proj_dir=str(tmp_path / "run")
            )
        )


NO_BINIDX = [
    (
        "r.txt",
        {},
        r"r.txt: a .txt file. Convert it first: .*convert.py --input \S*r.txt --output_prefix \S*r; then pass --data_file \S*r_text_document$",
    ),
    ("r.jsonl.gz", {}, r"a .jsonl.gz file. Convert it first: .* --output_prefix \S*/r; "),
    ("R.PARQUET", {}, "a .parquet file. Convert it first"),
    (
        "a b.json",
        {},
        "a .json file. .*--input '.*a b.json' --output_prefix '.*a b'; then pass --data_file '.*a b_text_document'",
    ),
    ("ids.npy", {}, "a NumPy file: also pass --data_type numpy"),
    ("corpus", {}, "not a binidx"),
    ("folder/", {}, "a folder. Convert it first: .*--output_prefix \\S*folder; "),
    ("sample", {"sample_text_document"}, "sample_text_document.idx exists: use --data_file .*sample_text_document"),
    ("sample.bin", {"sample"}, r"without .bin: --data_file \S*sample$"),
    ("sample.idx", {"sample"}, r"without .idx: --data_file \S*sample$"),
    ("gone", {}, "no such data .*gone.idx: no such file"),
]


@pytest.mark.parametrize(("name", "binidx_of", "message"), NO_BINIDX, ids=[case[0] for case in NO_BINIDX])
def test_not_a_binidx(name, binidx_of, message, make_data, tmp_path):
    for prefix in binidx_of:
        make_data(100, name=prefix)
    if not binidx_of and name != "gone":
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=message):
        fit(
            TrainConfig(
                **ONE_LAYER, vocab_size=50, data_file=str(tmp_path) + "/" + name, proj_dir=str(tmp_path / "run")
            )
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "binidx_of", "words"), NO_BINIDX, ids=[case[0] for case in NO_BINIDX])
def test_validation_data_is_not_a_binidx(name, binidx_of, words, make_data, tmp_path):
    data = make_data(100)
    for prefix in binidx_of:
        make_data(100, name=prefix)
    if not binidx_of and name != "gone":
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("text")
    flags = {**ONE_LAYER, "vocab_size": 50, "data_file": data, "proj_dir": str(tmp_path / "run"), "max_steps": 1}
    if name in ("sample.bin", "sample.idx"):  # accepted with their ending
        fit(TrainConfig(**flags, val_file=str(tmp_path / name)))
        return
    words = words.replace("--data_file", "--val_file").replace(
        "a NumPy file: also pass --data_type numpy", "a NumPy file, which only --data_file can be"
    )
    with pytest.raises(UserError, match=f"--val_file .*{words}"):
        fit(TrainConfig(**flags, val_file=str(tmp_path) + "/" + name))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["jsonl", "sft", "JSON"])
def test_data_type_of_other_trainers(kind, tmp_path):
    with pytest.raises(UserError, match=f"--data_type {kind}: omit the flag; a .jsonl file is recognised by its name"):
        fit(TrainConfig(**ONE_LAYER, data_type=kind, data_file="mine.jsonl", proj_dir=str(tmp_path / "run")))
