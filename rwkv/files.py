"""Files that appear whole or not at all, and their fingerprints."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rwkv.errors import UserError

_FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "your quota is used up", errno.EFBIG: "larger than a file may be here"}
_UMASK = os.umask(0)  # can only be read by setting it: once, before there are threads
os.umask(_UMASK)


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit it is synced to disk and renamed to `path`, on an exception removed.

    A crash leaves at most a hidden `.tmp` file, never half a file under the final name; the next write of `path` removes it.

    Raises:
        UserError: the disk is full, or read-only.
    """
    with together([path]) as (temporary,):
        yield temporary


@contextlib.contextmanager
def together(parts: Sequence[str | os.PathLike], marks: Sequence[str | os.PathLike] = ()) -> Iterator[list[Path]]:
    """As `whole`, for files that are of use only together: yields a temporary path for each of parts and marks, in this order.

    The marks, such as an index, make the parts valid: old ones go before the first part is renamed, new ones come after the last.
    A part whose temporary the block has removed is not wanted: an old one goes.
    """
    targets = [Path(path) for path in (*parts, *marks)]
    with full_disk(targets[0], "Nothing was written"), contextlib.ExitStack() as stack:
        temporaries = [stack.enter_context(_temporary(path)) for path in targets]
        yield temporaries
        for temporary in filter(Path.exists, temporaries):
            os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp makes 0600; a dataset or checkpoint is not a secret
            _sync(temporary)
        for mark in targets[len(parts) :]:
            mark.unlink(missing_ok=True)
        pairs = list(zip(temporaries, targets, strict=True))
        for some in (pairs[: len(parts)], pairs[len(parts) :]):
            for temporary, path in some:
                if temporary.exists():
                    os.replace(temporary, path)
                else:
                    path.unlink(missing_ok=True)
            for folder in {path.parent for _, path in some}:
                _sync(folder)


@contextlib.contextmanager
def full_disk(path: str | os.PathLike, left: str) -> Iterator[None]:
    """Turn the error of a full disk while `path` is written into a UserError, which ends with what is `left`."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EROFS:
            raise UserError(f"{path}: this file system is read-only; write to another place, in the container to out/") from error
        if error.errno not in _FULL:
            raise
        raise UserError(f"{path}: {_FULL[error.errno]}; make room or write to another place, and run again. {left}") from error


def abandoned(path: str | os.PathLike) -> list[Path]:
    """Temporaries of `path` that nobody is writing: a run that was to make it has been killed."""
    path, found = Path(path), []
    for name in glob.glob(f".{glob.escape(path.name)}.????????.tmp", root_dir=path.parent):
        with contextlib.suppress(OSError), open(path.parent / name, "rb") as file:  # a lock that is held is an OSError too
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(path.parent / name)
    return found


def reserve(file: BinaryIO, size: int) -> None:
    """Set aside `size` bytes on the disk for an open file, where the file system can; a writer that copes badly with a full disk then meets none.

    Raises:
        OSError: there is no room.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, max(1, size))
    except OSError as error:
        if error.errno in _FULL:
            raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new empty file beside `path`, locked for as long as we live: what is not locked is left over from a killed run, and goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in abandoned(path):
        stale.unlink(missing_ok=True)
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with contextlib.suppress(OSError):  # a file system without locks: then nothing is ever taken for left over
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # another run took it for left over before it was locked
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
