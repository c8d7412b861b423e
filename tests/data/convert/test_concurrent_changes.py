"""Input files that change during a conversion, and outputs that another process writes."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv.data.binidx import Dataset
from rwkv.data.convert import inputs
from rwkv.errors import UserError
from tests.data.convert.files import SCRIPT, converted, line, write


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def grow(path):
    with open(path, "a", encoding="utf-8") as file:
        file.write(line("more"))


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(b"1", b"2"))
    os.replace(other, path)


def rewrite(path):
    content = path.read_bytes()
    path.write_bytes(content[::-1] if path.suffix == ".txt" else content.replace(b"1", b"3"))


@pytest.mark.parametrize("change", [truncate, grow, replace, rewrite, Path.unlink])
@pytest.mark.parametrize("kind", ["jsonl", "txt", "jsonl.gz"])
def test_file_changed_during_conversion(tmp_path, monkeypatch, change, kind):
    """The file changes while the first chunk is tokenised."""
    path = tmp_path / f"x.{kind}"
    content = "".join(line(f"{i} word") for i in range(1000)).encode()
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    first = path.stat()
    real, changed = inputs.records, []

    def records(*arguments):
        if not changed:
            changed.append(True)
            change(path)
            # the clock may be too coarse for this test
            if path.exists() and path.stat().st_size == first.st_size:
                os.utime(path, ns=(first.st_atime_ns, first.st_mtime_ns + 1_000_000))
        yield from real(*arguments)

    monkeypatch.setattr("rwkv.data.convert.encode.records", records)
    with pytest.raises(UserError, match=rf"x.{kind}: was (changed|replaced by another file|removed) while it was read"):
        converted(path, tmp_path / "p")
    assert [x.name for x in tmp_path.iterdir() if "text_document" in x.name] == []


def test_output_is_locked(tmp_path):
    """The second process reports the first, whose output is intact."""
    (tmp_path / "a.jsonl").write_text("".join(line(f"{i} word " * 50) for i in range(3000)))
    write(tmp_path, "b.jsonl")
    command = [
        sys.executable,
        str(SCRIPT),
        "--input",
        f"{tmp_path}/a.jsonl",
        "--output-prefix",
        str(tmp_path / "p"),
        "--workers",
        "2",
    ]
    program = f"""
import runpy, sys, rwkv.data.convert.pipeline as c
real = c.inputs.chunks
def chunks(*a):
    yield from real(*a)
    print("locked", flush=True)
    sys.stdin.read()  # with the lock held, until the test closes it
c.inputs.chunks = lambda sources, fields, shard=None: chunks(sources, fields, shard) if shard else real(sources, fields)
sys.argv = {command[1:]!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    first = subprocess.Popen([sys.executable, "-c", program], **pipes, text=True)
    assert first.stdout.readline() == "locked\n", first.communicate()
    with pytest.raises(UserError, match=rf"p: in use by process {first.pid} on .* choose another --output-prefix"):
        converted(tmp_path / "b.jsonl", tmp_path / "p", force=True)
    assert not first.communicate()[1]
    assert first.returncode == 0
    assert len(Dataset(tmp_path / "p_text_document")) == 3000
    assert not [x for x in tmp_path.iterdir() if x.name.startswith(".")]
    assert converted(tmp_path / "b.jsonl", tmp_path / "p", force=True) == ["b.jsonl"]


def test_killed_conversion_without_file_locks(tmp_path):
    """Without flock (as on NFS), the owner of a temporary file is identified by its name."""
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", "a.jsonl")
    program = f"""
import errno, fcntl, os, runpy, sys
def flock(*_): raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
if len(sys.argv) > 1:
    import rwkv.data.convert.pipeline as c
    c.inputs.chunks = lambda *a: os.kill(os.getpid(), 9)
sys.argv = ["convert", "--input", {str(tmp_path / "in/a.jsonl")!r}, "--output-prefix", {str(tmp_path / "out/p")!r}, "--workers", "1"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    killed = subprocess.run(
        [sys.executable, "-c", program.replace("inputs.chunks = lambda *a:", "provenance.describe = lambda *a:"), "x"],
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -9
    left = {path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"}
    assert left
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "p_text_document.bin",
        "p_text_document.idx",
        "p_text_document.json",
    ]
