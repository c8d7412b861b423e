"""Atomic writes and hashes of files."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest

from rwkv.errors import UserError
from rwkv.files import atomic_write, atomic_writes, sha256, stale_temporaries, write_json


def test_old_file_kept_until_complete(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_interrupted_write_keeps_old_file(tmp_path, error):
    path = tmp_path / "f"
    path.write_text("old")

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe"])
def test_only_files_are_replaced(tmp_path, kind):
    """Renaming a file to /dev/null, as root, would break the system."""
    path = tmp_path / "f"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        path = tmp_path / "pipe" if kind == "pipe" else path
    if kind == "link to a pipe":
        path.symlink_to("pipe")
    before = path.lstat()
    with pytest.raises(UserError, match="a folder; pass a file name|a device or pipe, which cannot be replaced"):
        write_json(path, {})
    assert os.path.samestat(path.lstat(), before)


def test_files_written_together_marker_last(tmp_path, monkeypatch):
    for name in ("part", "gone", "mark"):
        (tmp_path / name).write_text("old")
    order = []
    replace = os.replace
    monkeypatch.setattr(
        "os.replace", lambda old, new: (order.append((new.name, (tmp_path / "mark").exists())), replace(old, new))
    )
    with atomic_writes([tmp_path / "part", tmp_path / "gone"], [tmp_path / "mark"]) as (part, gone, mark):
        part.write_text("new")
        mark.write_text("new")
        gone.unlink()
    assert order == [("part", False), ("mark", False)]  # the old mark is removed before the new part appears
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"part": "new", "mark": "new"}


def test_stale_temporaries_removed(tmp_path):
    path = tmp_path / "f"
    program = (
        f"import os; from rwkv.files import atomic_write\nwith atomic_write({str(path)!r}): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    (stale,) = stale_temporaries(path)
    with atomic_write(path) as mine:
        assert not stale.exists()
        assert stale_temporaries(path) == []
        with atomic_write(path) as other:  # another run at the same time
            assert mine.exists()
            other.write_text("other")
        mine.write_text("mine")
    assert [x.read_text() for x in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "no space left on the device"), (errno.EDQUOT, "quota"), (errno.EFBIG, "maximum file size")],
)
def test_disk_full(tmp_path, number, message):
    with pytest.raises(UserError, match=f"f: .*{message}.*; free some space"), atomic_write(tmp_path / "f"):
        raise OSError(number, "")
    with pytest.raises(OSError, match="other"), atomic_write(tmp_path / "f"):
        raise OSError(errno.EIO, "other")
    assert list(tmp_path.iterdir()) == []


def test_creates_folders_with_default_permissions(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"键": 1})
    path = tmp_path / "a" / "b.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {"键": 1}
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_name_that_is_not_utf8(tmp_path):
    """Python represents the bytes of such a file name by surrogates, which UTF-8 cannot encode."""
    value = {os.fsdecode(b"\xb2\xe2.bin"): [os.fsdecode(b"/\xff/a"), "测试 😀 \\udcff"]}
    write_json(tmp_path / "f", value)
    assert json.loads((tmp_path / "f").read_text(encoding="utf-8")) == value


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file/f", "its folder is a file or a broken link"),
        ("file/a/f", "its folder is a file or a broken link"),
        ("dangling/f", "its folder is a file or a broken link"),
        ("loop/f", "its folder is a file or a broken link"),
        ("x" * 300, "the name is too long"),
    ],
)
def test_file_that_cannot_be_created(tmp_path, target, message):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        write_json(tmp_path / target, {})
    assert str(caught.value).startswith(f"{tmp_path / target}: cannot be written: {message}; use ")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_no_permission(tmp_path, monkeypatch, number):
    def refuse(dir, **keywords):
        raise OSError(number, os.strerror(number), f"{dir}/.f.random.tmp")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(UserError, match="/f: cannot be written: no permission; use another folder, or change"):
        write_json(tmp_path / "f", {})


def test_sha256(tmp_path):
    data = b"x" * (5 << 20)
    (tmp_path / "f").write_bytes(data)
    assert sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_read_only_file_system(tmp_path, monkeypatch):
    def read_only(dir, **keywords):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr("tempfile.mkstemp", read_only)
    with (
        pytest.raises(UserError, match="f: this file system is read-only; write to another folder"),
        atomic_write(tmp_path / "f"),
    ):
        pass
