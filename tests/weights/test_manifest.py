"""Adapter manifests: invalid values are reported, and base models are found."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from rwkv import checkpoint
from rwkv.adapter_files import find_base, inspect_adapter, load_combined, load_tuned, save_adapter
from rwkv.adapters import lora
from rwkv.checkpoint import load_model, read_manifest
from rwkv.errors import UserError, printable
from rwkv.files import sha256


@pytest.fixture
def tuned(tmp_path, make_base):
    """A base and, in another folder, an adapter on it."""
    base = make_base()
    model = load_model(base)
    lora.inject(model, ["att"], 4, 8)
    known = {"r": 4, "alpha": 8, "parts": ["att"], "base": str(base), "base_sha256": sha256(base)}
    save_adapter(tmp_path / "run/adapter.pth", model, known, {})
    return base, tmp_path / "run/adapter.pth"


def with_values(adapter: Path, **values) -> Path:
    manifest = json.loads((adapter.parent / f"{adapter.name}.json").read_text())
    (adapter.parent / f"{adapter.name}.json").write_text(json.dumps({**manifest, **values}))
    return adapter


WRONG = {
    "alpha": ["abc", None, [], {}, True, float("nan"), float("inf"), -1, 0, 1e308, 10**400],
    "r": ["4", None, -4, 0, 4.0, True, [4], 1 << 40, 5],
    "parts": ["att", None, [1], ["att", "nothing"], {"att": 1}, [["att"]]],
    "base": [5, [], {}, True, "", "a\0b", "\ud800", "x" * 5000],
    "base_sha256": [5, [], "abc", "\x1b[2J", True, "g" * 64],
    "kind": ["model", 3, None],
    "version": ["8", 4, ["7"]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_invalid_value(tuned, key, value):
    base, adapter = tuned
    with_values(adapter, **{key: value})
    for read in (inspect_adapter, lambda path: load_tuned(base, path), lambda path: load_combined(base, [path], [1.0])):
        with pytest.raises(UserError, match="adapter.pth"):
            read(adapter)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"3",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"alpha": ' + b"1" * 10_000 + b"}",
        b"{}" + b" " * (17 << 20),
    ],
    ids=range(11),
)
def test_not_a_manifest(tuned, content):
    _, adapter = tuned
    Path(f"{adapter}.json").write_bytes(content)
    for read in (read_manifest, inspect_adapter, find_base):
        if content.startswith(b'{"alpha"') and read is read_manifest:
            continue  # valid where Python does not limit the digits of numbers
        with pytest.raises(UserError, match="adapter.pth.json"):
            read(adapter)


def test_manifest_is_pipe_or_folder(tuned):
    _, adapter = tuned
    path = Path(f"{adapter}.json")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="a device or pipe"):
        inspect_adapter(adapter)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="a folder"):
        inspect_adapter(adapter)


def test_base_path_relative_to_adapter(tuned, tmp_path, monkeypatch):
    base, adapter = tuned
    assert read_manifest(adapter)["base"] == "../base.pth"
    assert find_base(adapter).samefile(base)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    adapter = tmp_path / "moved/adapter.pth"
    assert find_base(adapter).samefile(base)
    shutil.move(base, tmp_path / "moved/base.pth")
    assert find_base(adapter).samefile(tmp_path / "moved/base.pth")
    shutil.move(tmp_path / "moved/base.pth", tmp_path / "elsewhere.pth")
    assert find_base(adapter) is None
    monkeypatch.chdir(tmp_path)
    # from the working directory, or absolute
    for old in ("elsewhere.pth", str(tmp_path / "elsewhere.pth")):
        assert find_base(with_values(adapter, base=old)).samefile("elsewhere.pth")


def test_base_chosen_by_sha256(tuned, tmp_path, make_base, monkeypatch):
    base, adapter = tuned
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "run/models").mkdir()
    Path("models").mkdir()
    with_values(adapter, base="models/base.pth")
    shutil.copy(make_base("other.pth", seed=3), tmp_path / "run/models/base.pth")
    shutil.copy(base, "models/base.pth")
    assert find_base(adapter).samefile("models/base.pth")


def test_base_verified_before_reading(tuned, tmp_path, monkeypatch):
    _, adapter = tuned
    other = tmp_path / "other.pth"
    torch.save({"emb.weight": torch.zeros(2, 2)}, other)
    seen = []
    read = checkpoint.read_tensors
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path: (seen.append(Path(path).name), read(path))[1])
    for load in (lambda: load_tuned(other, adapter), lambda: load_combined(other, [adapter], [1.0])):
        with pytest.raises(UserError, match="adapter of another base"):
            load()
    assert set(seen) == {"adapter.pth"}


def test_no_absolute_paths(tmp_path, make_model):
    given = {
        "flags": {"load_model": str(tmp_path / "base.pth"), "lr_init": 1e-4, "data_file": "data/x"},
        "data": str(tmp_path / "data"),
        "step": 3,
    }
    checkpoint.save_model(tmp_path / "run/x.pth", make_model(), given)
    assert str(tmp_path) not in Path(tmp_path / "run/x.pth.json").read_text()
    found = read_manifest(tmp_path / "run/x.pth")
    assert (found["flags"], found["data"]) == (
        {"load_model": "../base.pth", "lr_init": 1e-4, "data_file": "data/x"},
        "../data",
    )


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -2.0])
def test_alpha_flag_must_be_positive(tuned, alpha):
    with pytest.raises(UserError, match="must be a positive number"):
        inspect_adapter(tuned[1], alpha=alpha)


def test_control_characters_escaped():
    assert printable("\x1b[31m\x9b\x07\u202e\ud800") == "\\x1b[31m\\x9b\\x07\\u202e\\ud800"
    assert printable("tab\tline\nand 你好 é 👩‍👩‍👧") == "tab\tline\nand 你好 é 👩‍👩‍👧"
    assert str(UserError("\x1b]0;x\x07")) == "\\x1b]0;x\\x07"
