"""Lock files exclude other processes, and leave nothing behind."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from rwkv.errors import UserError
from rwkv.locks import exclusive


def holder(path, before=""):
    """Another process that holds the lock `path`, after running the statement `before`."""
    program = f"""
import os, time
from rwkv.locks import exclusive
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
from rwkv.locks import exclusive
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
