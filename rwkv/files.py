"""Files that appear whole or not at all; hashes of files; opening regular files only."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rwkv.errors import UserError

_FULL = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EFBIG: "the file exceeds the maximum file size",
}
# why a file cannot be created, and what to do
_REFUSED = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "no permission; use another folder, or change its permissions"),
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR, errno.ELOOP), "its folder is a file or a broken link; use another one"
    ),
    errno.ENAMETOOLONG: "the name is too long; use a shorter one",
}
_UMASK = os.umask(0)  # reading it means setting it, which is not thread-safe: once, at import
os.umask(_UMASK)
_MAX_HASHED = 4 << 30  # bytes up to which `fingerprint` hashes the whole file (takes some seconds)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path, which is synced and renamed to `path`, or
    removed on an exception.

    A crash leaves at most a hidden `.tmp` file, which the next write of `path` removes.

    Raises:
        UserError: as `atomic_writes`.
    """
    with atomic_writes([path]) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_writes(parts: Sequence[str | os.PathLike], marks: Sequence[str | os.PathLike] = ()) -> Iterator[list[Path]]:
    """Write a set of files as atomically as possible: yields a temporary path for each of `parts`
    and `marks`, in this order.

    The marks, such as an index, make the parts valid: old marks are removed before the first part
    is renamed, and new ones are renamed last. If the block deletes a temporary, an existing file of
    that name is removed.

    Raises:
        UserError: a path is a folder, device or pipe; the disk is full, or read-only; a file cannot
            be created there.
    """
    targets = [Path(path) for path in (*parts, *marks)]
    for path in targets:
        _check_replaceable(path)
    with disk_errors(targets[0], "Nothing was written"), contextlib.ExitStack() as stack:
        temporaries = [stack.enter_context(_temporary(path)) for path in targets]
        yield temporaries
        for temporary in filter(Path.exists, temporaries):
            os.chmod(temporary, 0o666 & ~_UMASK)  # mkstemp creates files with mode 0600
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


def _check_replaceable(path: Path) -> None:
    """Raise UserError unless the path is a regular file or does not exist. (A rename would replace
    even /dev/null.)
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: a folder; pass a file name")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: a device or pipe, which cannot be replaced by a file; pass a file name")


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike, outcome: str) -> Iterator[None]:
    """Convert disk-full and read-only errors into UserErrors about `path`; `outcome` says what
    happened to existing files.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EROFS:
            raise UserError(
                f"{path}: this file system is read-only; write to another folder (in the container: out/)"
            ) from error
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{path}: {_FULL[error.errno]}; free some space or write to another disk, and run again. {outcome}"
        ) from error


def stale_temporaries(path: str | os.PathLike) -> list[Path]:
    """Temporary files of `path` that killed processes left behind."""
    path, found = Path(path), []
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}(?:\.(\w+-\d+-\d+))?\.tmp")
    for name in os.listdir(path.parent) if path.parent.is_dir() else ():
        if not (match := pattern.fullmatch(name)):
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError), open(path.parent / name, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(path.parent / name)
            except OSError as error:
                # in use; or the file system does not support locks, and the name contains the owner
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) and match[1] and _has_ended(match[1]):
                    found.append(path.parent / name)
    return found


def is_unfinished(path: str | os.PathLike, mark: str | os.PathLike) -> bool:
    """Whether a process was killed between renaming `path` and its mark (see `atomic_writes`)."""
    return not os.path.lexists(mark) and bool(stale_temporaries(mark)) and not stale_temporaries(path)


def _owner() -> str:
    """Identifies this process in a file name: host, process id and start time, as process ids are
    reused.
    """
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return f"{host}-{os.getpid()}-{_started(os.getpid())}"


def _started(pid: int) -> int:
    """Start time of a process, in clock ticks since boot; 0 if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _has_ended(owner: str) -> bool:
    """Whether the owner (see `_owner`) was a process of this host that has ended."""
    host, pid, started = owner.split("-")
    return host == _owner().split("-")[0] and _started(int(pid)) != int(started)


def reserve(file: BinaryIO, size: int) -> None:
    """Preallocate `size` bytes for an open file if the file system supports it, for writers that
    handle a full disk badly.

    Raises:
        OSError: the disk is full.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, max(1, size))
    except OSError as error:
        if error.errno in _FULL:
            raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` atomically as indented JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")


def json_text(value: Any) -> str:
    """`value` as indented JSON, with a newline at the end. Surrogates, which stand for the bytes of
    a file name that is not UTF-8, are escaped.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # \udcff: also an escape of JSON


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of a file; above 4 GiB, `blocks:` and the SHA-256 of its size and 1024 blocks spread
    over it.
    """
    size, block = os.stat(path).st_size, 1 << 16
    if size <= _MAX_HASHED:
        return sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(1024):
            file.seek(i * (size - block) // 1023)
            digest.update(file.read(block))
    return f"blocks:{digest.hexdigest()}"


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Create an empty temporary file beside `path` and lock it; unlocked ones were left by killed
    processes and are removed.

    Raises:
        UserError: it cannot be created; see _REFUSED.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in stale_temporaries(path):
            stale.unlink(missing_ok=True)
        handle, name = _created(path)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise UserError(f"{path}: cannot be written: {_REFUSED[error.errno]}") from error
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
        os.close(handle)


def _created(path: Path) -> tuple[int, str]:
    """A new temporary file of `path`, locked: (descriptor, name)."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # locks are not supported: put the owner into the name
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                owned = f"{name.removesuffix('.tmp')}.{_owner()}.tmp"
                os.rename(name, owned)
                name = owned
        if os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)  # another process removed it before it was locked


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def open_regular(path: str | os.PathLike, what: str = "file") -> Iterator[BinaryIO]:
    """Open a regular file for reading. FIFOs, devices and directories are rejected without opening
    them, which could block.

    Args:
        what: what is expected, for messages.

    Raises:
        UserError: the file does not exist, cannot be read, or is not a regular file.
    """
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise UserError(f"{path}: a folder, not a {what}; pass a file")
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: a device or pipe, not a {what}; use a regular file")
        # O_NONBLOCK: a FIFO that replaces the file meanwhile cannot block either
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {_unreadable(error, what)}") from error
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UserError(f"{path}: a device or pipe, not a {what}; use a regular file")
        yield file


def _unreadable(error: Exception, what: str) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return f"no such {what}"
    if number in (errno.EACCES, errno.EPERM):
        return f"no permission to read this {what}; change its permissions (chmod, chown), or run as its owner"
    if number == errno.ENAMETOOLONG:
        return f"no {what}: the name is too long"
    if number == errno.ELOOP:
        return f"no such {what}: its symbolic links form a loop"
    return f"no {what} can have this name ({error})" if number is None else f"cannot be read ({os.strerror(number)})"
