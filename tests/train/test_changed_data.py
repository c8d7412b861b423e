"""A run whose data has changed since it was started: data file, its converted copy, loss mask and
index, training and validation data.
"""

import json
import os
import re

import numpy as np
import pytest

from rwkv.config import TrainConfig
from rwkv.data import binidx, binidx_writer
from rwkv.data.binidx import Dataset
from rwkv.errors import UserError
from rwkv.train.fit import fit
from tests.train.finished_run import changed, content
from tests.train.small_runs import ONE_LAYER, losses

JSONL = {**ONE_LAYER, "vocab_size": 65536, "epoch_count": 3, "max_steps": 1}


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
    flags = {**ONE_LAYER, "vocab_size": 50} if kind == "numpy" else ONE_LAYER
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
    config = TrainConfig(
        **{**ONE_LAYER, "vocab_size": 50}, data_file=prefix, proj_dir=str(tmp_path / "run"), max_steps=1
    )
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
    flags = {**ONE_LAYER, "vocab_size": 50, "data_file": make_data(200), "proj_dir": str(tmp_path / "run")}
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
    config = TrainConfig(
        **{**ONE_LAYER, "vocab_size": 50}, data_file=prefix, proj_dir=str(tmp_path / "run"), max_steps=1
    )
    fit(config)
    assert json.loads((tmp_path / "run/run.json").read_text())["data"]["sha256"].startswith("blocks:")
    raw = bytearray((tmp_path / "data.bin").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "data.bin").write_bytes(raw)
    with pytest.raises(UserError, match=r"data \(SHA-256, bytes\)"):
        fit(changed(config, max_steps=2))
