"""Atomic writes, locks and hashes of files."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys

import pytest

from rwkv.errors import UserError
from rwkv.files import atomic_write, atomic_writes, exclusive, sha256, stale_temporaries, write_json


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


def holder(path, before=""):
    """Another process that holds the lock `path`, after running the statement `before`."""
    program = f"""
import os, time
from rwkv.files import exclusive
with exclusive({str(path)!r}, "x"):
    {before}
    print(flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--flag", "a b"], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"\n"
    return process


def test_lock_is_exclusive_and_released_on_kill(tmp_path):
    path = tmp_path / "a/b/.lock"
    process = holder(path, "if os.fork() == 0: print(flush=True); time.sleep(600)")
    try:
        assert process.stdout.readline() == b"\n"  # parent and child have both started
        with (
            pytest.raises(
                UserError,
                match=rf"out: in use by process {process.pid} on .* \(-c --flag 'a b'\)\. .*, or choose another --proj_dir",
            ),
            exclusive(path, "out", "choose another --proj_dir"),
        ):
            raise AssertionError
        process.kill()
        process.wait()
        with exclusive(path, "out"):  # although its child still runs
            assert json.loads(path.read_text())["pid"] == os.getpid()
            with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), exclusive(path, "out"):
                pass
        assert not path.exists()
    finally:
        os.killpg(process.pid, 9)
        process.stdout.close()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_lock_cleans_up(tmp_path, error):
    def use(keep):
        with exclusive(tmp_path / "a/b/.lock", "a"):
            if keep:
                (tmp_path / "a/kept").touch()
            if error:
                raise error

    for keep in (False, True):
        if error:
            with pytest.raises(error):
                use(keep)
        else:
            use(keep)
        assert [path.name for path in tmp_path.rglob("*")] == (["a", "kept"] if keep else [])


def test_moved_lock_keeps_other_lock(tmp_path):
    with exclusive(tmp_path / "run/.lock", "run"):
        (tmp_path / "run").rename(tmp_path / "moved")
        process = holder(tmp_path / "run/.lock")
    try:
        assert (tmp_path / "run/.lock").exists()
        with pytest.raises(UserError, match="in use"), exclusive(tmp_path / "run/.lock", "run"):
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_lock_contention(tmp_path):
    program = f"""
import os, time
from rwkv.errors import UserError
from rwkv.files import exclusive
deadline = time.monotonic() + 1.5
while time.monotonic() < deadline:
    try:
        with exclusive({str(tmp_path / "x/.lock")!r}, "x"):
            handle = os.open({str(tmp_path / "held")!r}, os.O_CREAT | os.O_EXCL)
            os.close(handle)
            os.unlink({str(tmp_path / "held")!r})
    except UserError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[1] for process in processes] == [""] * 4


def test_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with exclusive(tmp_path / ".lock", "out"):
        assert "out: this file system does not support locks" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file/.lock", "n" * 300 + "/.lock", "folder"])
def test_unwritable_lock(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(UserError, match="out: cannot be written to .*; choose another"),
        exclusive(tmp_path / place, "out"),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_disk_full_leaves_no_lock_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="no space left"), exclusive(tmp_path / "new/lock", "the output"):
        pytest.fail("the block ran without a lock file")
    assert not [*tmp_path.iterdir()]
