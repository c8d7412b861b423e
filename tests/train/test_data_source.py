"""Upstream's other data types are converted to binidx: text, numpy arrays, dummy data. Sources are
compared on resume.
"""

import json
import os
import re

import numpy as np
import pytest

from rwkv.checkpoint import read_manifest
from rwkv.config import TrainConfig
from rwkv.data import binidx, binidx_writer
from rwkv.data.binidx import Dataset
from rwkv.errors import UserError
from rwkv.train.fit import fit

FLAGS = {
    "n_layer": 1,
    "version": "4",
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
def test_text_characters(kind, tmp_path):
    text = "Ein Käfig ging\r\neinen Vogel suchen. 鳥 🐦\n" * 3
    (tmp_path / "t.txt").write_bytes(text.encode(kind))
    flags = {**FLAGS, "data_type": kind, "data_file": str(tmp_path / "t.txt"), "proj_dir": str(tmp_path / "run")}
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
        **FLAGS,
        "data_type": "numpy",
        "data_file": str(tmp_path / "train.npy"),
        "vocab_size": 50277,
        "proj_dir": str(tmp_path / "run"),
    }
    fit(TrainConfig(**flags))
    data = Dataset(tmp_path / "run/data_text_document")
    assert (data.tokens.dtype, data.tokens.tolist(), len(data)) == (np.uint16, ids.tolist(), 1)


def test_dummy_data(tmp_path):
    fit(TrainConfig(**FLAGS, data_type="dummy", proj_dir=str(tmp_path / "run")))
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
                **FLAGS, devices=2, data_file=str(write_jsonl({"text": "x" * 99})), proj_dir=str(tmp_path / "run")
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
        fit(TrainConfig(**{**FLAGS, "data_file": str(tmp_path / "t"), "proj_dir": str(tmp_path / "run"), **flags}))
    assert not (tmp_path / "run").exists()
    np.save(tmp_path / "two.npy", np.zeros((2, 2)))
    with pytest.raises(UserError, match=r"an array of float64 \[2, 2\]"):
        fit(
            TrainConfig(**FLAGS, data_type="numpy", data_file=str(tmp_path / "two.npy"), proj_dir=str(tmp_path / "run"))
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
        fit(TrainConfig(**FLAGS, vocab_size=50, data_file=str(tmp_path) + "/" + name, proj_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "binidx_of", "words"), NO_BINIDX, ids=[case[0] for case in NO_BINIDX])
def test_validation_data_is_not_a_binidx(name, binidx_of, words, make_data, tmp_path):
    data = make_data(100)
    for prefix in binidx_of:
        make_data(100, name=prefix)
    if not binidx_of and name != "gone":
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("text")
    flags = {**FLAGS, "vocab_size": 50, "data_file": data, "proj_dir": str(tmp_path / "run"), "max_steps": 1}
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
        fit(TrainConfig(**FLAGS, data_type=kind, data_file="mine.jsonl", proj_dir=str(tmp_path / "run")))


JSONL = {**FLAGS, "vocab_size": 65536, "epoch_count": 3, "max_steps": 1}


def changed(config, **flags):
    return type(config)(**{**vars(config), **flags})


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def jsonl(path, word, count=20):
    path.write_text("".join(json.dumps({"text": f"{word} number {i}"}) + "\n" for i in range(count)))
    return str(path)


def other_file(path):
    return jsonl(path.with_name("b.jsonl"), "another")


def edited(path):
    return jsonl(path, "changed!", 20)


def edited_keeping_size_and_time(path):
    before = path.stat()
    path.write_text(path.read_text().replace("number 7", "number 8"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return str(path)


def broken(path):
    with open(path, "a") as file:
        file.write('{"text": "cut')
    return str(path)


@pytest.mark.parametrize("change", [other_file, edited, edited_keeping_size_and_time, broken], ids=lambda x: x.__name__)
def test_changed_source(change, tmp_path):
    path, folder = tmp_path / "a.jsonl", tmp_path / "run"
    config = TrainConfig(**JSONL, data_file=jsonl(path, "document"), proj_dir=str(folder))
    fit(config)
    original, before = path.read_bytes(), content(folder)
    config = changed(config, data_file=change(path), max_steps=2)
    with pytest.raises(
        UserError,
        match=rf"data file: {path} \(SHA-256 [0-9a-f]{{16}}…\) → {config.data_file} \(SHA-256 [0-9a-f]{{16}}…\)\nChoose one",
    ):
        fit(config)
    assert content(folder) == before
    if change is broken:
        with pytest.raises(UserError, match="a.jsonl, line 21"):
            fit(changed(config, allow_changes=True))
        assert content(folder) == before
    else:
        fit(changed(config, allow_changes=True))
        run = json.loads((folder / "run.json").read_text())
        assert run["data"]["prefix"] != str(folder / "data_text_document")
        assert any(line.startswith("data file: ") for line in run["changed"][0]["changes"])
        assert any(line.startswith("data (SHA-256, bytes)") for line in run["changed"][0]["changes"])
        fit(changed(config, max_steps=3))  # continues with the changed source
    path.write_bytes(original)
    fit(changed(config, data_file=str(path), proj_dir=str(tmp_path / "same")))
    config = changed(config, data_file=str(path), max_steps=4, allow_changes=change is not broken)
    fit(config)  # with the original again, from the run's copy
    assert json.loads((folder / "run.json").read_text())["data"]["prefix"] == str(folder / "data_text_document")


def test_deleted_source(tmp_path, capsys):
    path, folder = tmp_path / "a.jsonl", tmp_path / "run"
    config = TrainConfig(**JSONL, data_file=jsonl(path, "document"), proj_dir=str(folder))
    fit(config)
    (tmp_path / "copied.jsonl").write_bytes(path.read_bytes())
    fit(changed(config, max_steps=2, data_file=str(tmp_path / "copied.jsonl")))  # same content, another path
    with pytest.raises(UserError, match="gone.jsonl: no such file"):
        fit(changed(config, max_steps=3, data_file=str(tmp_path / "gone.jsonl"), allow_changes=True))
    (tmp_path / "copied.jsonl").unlink()
    config = changed(config, max_steps=3, data_file=str(tmp_path / "copied.jsonl"))
    with pytest.raises(UserError, match="copied.jsonl: no such file; the run in .* used it.*--allow_changes"):
        fit(config)
    capsys.readouterr()
    fit(changed(config, allow_changes=True))
    assert re.search(
        "changed: data file .*copied.jsonl: present → missing; the copy .* is used", capsys.readouterr().out
    )
    assert len(losses(folder)) == 3
    fit(changed(config, data_file=str(folder / "data_text_document"), max_steps=4))
    assert len(losses(folder)) == 4


@pytest.mark.parametrize("kind", ["utf-8", "numpy"])
def test_changed_text_or_numpy_source(kind, tmp_path):
    path = tmp_path / ("t.npy" if kind == "numpy" else "t.txt")

    def write(shift):
        if kind == "numpy":
            np.save(path, np.arange(shift, 100 + shift) % 50)
        else:
            path.write_text("".join("abcdef"[(i * i + shift) % 6] for i in range(200)))

    write(0)
    flags = {**FLAGS, "vocab_size": 50} if kind == "numpy" else FLAGS
    config = TrainConfig(**flags, data_type=kind, data_file=str(path), proj_dir=str(tmp_path / "run"), max_steps=1)
    fit(config)
    write(1)
    with pytest.raises(UserError, match="data file: .* → "):
        fit(changed(config, max_steps=2))
    write(0)
    fit(changed(config, max_steps=2))
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}: [Nn]o such file"):
        fit(changed(config, max_steps=2))


def test_deleted_copy_rebuilt(tmp_path):
    config = TrainConfig(**JSONL, data_file=jsonl(tmp_path / "a.jsonl", "document"), proj_dir=str(tmp_path / "run"))
    fit(config)
    for path in (tmp_path / "run").glob("data*"):
        path.unlink()
    fit(changed(config, max_steps=2))
    fit(changed(config, max_steps=2, proj_dir=str(tmp_path / "new")))
    assert losses(tmp_path / "run") == losses(tmp_path / "new")


def test_start_after_failed_start(tmp_path):
    folder = tmp_path / "run"
    config = TrainConfig(**JSONL, data_file=jsonl(tmp_path / "a.jsonl", "document"), proj_dir=str(folder))
    with pytest.raises(UserError, match="one sample of ctx_len 5000 needs 5002"):
        fit(changed(config, ctx_len=5000))
    built = (folder / "data_text_document.bin").stat().st_mtime_ns
    fit(config)  # with the existing copy
    assert (folder / "data_text_document.bin").stat().st_mtime_ns == built
    other = changed(config, proj_dir=str(tmp_path / "other"), ctx_len=5000)
    with pytest.raises(UserError, match="one sample of ctx_len 5000"):
        fit(other)
    fit(
        changed(other, ctx_len=8, data_file=jsonl(tmp_path / "b.jsonl", "another"))
    )  # other data after the rejected start
    prefix = json.loads((tmp_path / "other/run.json").read_text())["data"]["prefix"]
    assert prefix == str(tmp_path / "other/data_text_document")
    fit(changed(other, ctx_len=8, data_file=str(tmp_path / "b.jsonl"), proj_dir=str(tmp_path / "plain")))
    assert losses(tmp_path / "other") == losses(tmp_path / "plain")


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_start_after_killed_conversion(renames, start, tmp_path, root):
    folder = tmp_path / "run"
    flags = {**JSONL, "data_file": jsonl(tmp_path / "a.jsonl", "document"), "proj_dir": str(folder)}
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(f"""
import os
replace, left = os.replace, [{renames} + 1]
def killed(old, new, **keywords):
    left[0] -= "document" in str(new) and not str(new).endswith(".source.json")
    if not left[0]: os.killpg(0, 9)
    replace(old, new, **keywords)
os.replace = killed
""")  # in whichever process the conversion runs
    (tmp_path / "program.py").write_text(
        "import os; os.setsid()\n"
        "from rwkv.config import TrainConfig; from rwkv.train.fit import fit\n"
        f"fit(TrainConfig(**{flags!r}))"
    )
    path = os.pathsep.join([str(tmp_path / "site"), str(root)])
    result = start(tmp_path / "program.py", environment={**os.environ, "PYTHONPATH": path}).result()
    assert result.returncode == -9, result.stderr
    assert (folder / "data_text_document.source.json").exists()
    fit(TrainConfig(**flags))
    fit(TrainConfig(**flags | {"proj_dir": str(tmp_path / "new")}))
    assert losses(folder) == losses(tmp_path / "new")


def test_binidx_of_user_kept(tmp_path, make_data):
    folder = tmp_path / "run"
    folder.mkdir()
    prefix = make_data(100, name="run/data_text_document")
    before = content(folder)
    config = TrainConfig(**JSONL, data_file=jsonl(tmp_path / "a.jsonl", "document"), proj_dir=str(folder))
    fit(config)
    fit(changed(config, overwrite=True))
    fit(changed(config, overwrite=True, data_file=prefix))
    assert {path: content(folder)[path] for path in before} == before
    assert not list(folder.glob("data-*"))  # the copy of the earlier run was deleted


def change_mask(prefix):
    mask = binidx.mask_path(prefix)
    mask.write_bytes(bytes(1 - x for x in mask.read_bytes()))


def delete_mask(prefix):
    binidx.mask_path(prefix).unlink()


def other_documents(prefix):
    tokens = Dataset(prefix).tokens.tolist()
    with binidx_writer.writer(f"{prefix}2") as out:
        out.add(tokens[:70])
        out.add(tokens[70:])
    os.replace(f"{prefix}2.idx", f"{prefix}.idx")


def test_changed_mask_or_index(make_data, tmp_path):
    prefix = make_data(200)
    binidx.mask_path(prefix).write_bytes(bytes([0, 1] * 100))
    config = TrainConfig(**{**FLAGS, "vocab_size": 50}, data_file=prefix, proj_dir=str(tmp_path / "run"), max_steps=1)
    fit(config)
    files = [binidx.mask_path(prefix), tmp_path / "data.idx"]
    good = [path.read_bytes() for path in files]
    for change, message in (
        (change_mask, "loss mask"),
        (delete_mask, "loss mask .SHA-256.: [0-9a-f]{64} → none"),
        (other_documents, "documents, in the index"),
    ):
        change(prefix)
        with pytest.raises(UserError, match=message):
            fit(changed(config, max_steps=2))
        for path, raw in zip(files, good, strict=True):
            path.write_bytes(raw)
    fit(changed(config, max_steps=2))


def test_changed_mask_or_index_of_validation_data(make_data, tmp_path):
    prefix = make_data(200, name="val")
    binidx.mask_path(prefix).write_bytes(bytes([0, 1] * 100))
    flags = {**FLAGS, "vocab_size": 50, "data_file": make_data(200), "proj_dir": str(tmp_path / "run")}
    config = TrainConfig(**flags, val_file=prefix, max_steps=1)
    fit(config)
    change_mask(prefix)
    with pytest.raises(UserError, match="validation loss mask"):
        fit(changed(config, max_steps=2))
    change_mask(prefix)
    other_documents(prefix)
    with pytest.raises(UserError, match="validation documents, in the index"):
        fit(changed(config, max_steps=2))


def test_large_data_hashed_in_blocks(make_data, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv.files._MAX_HASHED", 1000)
    prefix = make_data(100_000)
    config = TrainConfig(**{**FLAGS, "vocab_size": 50}, data_file=prefix, proj_dir=str(tmp_path / "run"), max_steps=1)
    fit(config)
    assert json.loads((tmp_path / "run/run.json").read_text())["data"]["sha256"].startswith("blocks:")
    raw = bytearray((tmp_path / "data.bin").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "data.bin").write_bytes(raw)
    with pytest.raises(UserError, match=r"data \(SHA-256, bytes\)"):
        fit(changed(config, max_steps=2))
