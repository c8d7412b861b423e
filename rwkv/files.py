"""Files that appear atomically, locks that one process at a time holds, and fingerprints."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from rwkv.errors import UserError

_FULL = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "your quota is used up",
    errno.EFBIG: "larger than a file may be here",
}
_UMASK = os.umask(0)  # can only be read by setting it: once, before there are threads
os.umask(_UMASK)
_HASHED = 4 << 30  # bytes of a file that `fingerprint` reads in full: some seconds
_HELD: set[int] = set()  # descriptors of the locks that this process holds


def _release_inherited_locks() -> None:
    while _HELD:
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_release_inherited_locks)  # a lock ends with the process that took it


@contextlib.contextmanager
def exclusive(path: str | os.PathLike, what: str | os.PathLike, advice: str = "choose another one") -> Iterator[None]:
    """Hold the lock file `path` for as long as the block runs, so that one process at a time uses what it protects.

    The lock is the kernel's (flock): it ends with the process however that ends, and a file that a killed process left is no obstacle. On a clean
    end the file is removed, with the folders that were made for it alone. Where the file system cannot lock, this is said and the block runs.

    Args:
        path: the lock file. It contains host, process id, command and start time of its holder.
        what: what it protects, as the user named it: a folder, an output.
        advice: what the user can do besides waiting.

    Raises:
        UserError: another process holds it (which one is said), or no file can be written there.
    """
    path = Path(path)
    made = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        with full_disk(path, "Nothing was written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, locked = _locked(path, what, advice)
    except OSError as error:
        _remove_empty(made)
        raise UserError(
            f"{what}: cannot be written to ({error.strerror}: {error.filename or path}); {advice}"
        ) from error
    _HELD.add(handle)
    try:
        if not locked:
            print(
                f"warning: {what}: this file system has no locks; take care that no other process uses it",
                file=sys.stderr,
                flush=True,
            )
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may have been moved or replaced
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                path.unlink()
        _HELD.discard(handle)
        os.close(handle)
        _remove_empty(made)


def _locked(path: Path, what: str | os.PathLike, advice: str) -> tuple[int, bool]:
    """An open descriptor of the lock file with our name in it, and whether it is locked. Raises UserError if another process holds the lock."""
    while True:
        handle, locked = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = _holder(handle)
                os.close(handle)
                raise UserError(f"{what}: in use by {holder}. Wait until it ends or stop it; or {advice}") from error
            locked = False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                break
        os.close(handle)  # its last holder removed it before we locked it
    here = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": shlex.join(sys.argv),
        "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
    }
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(here).encode(), 0)
    except OSError:
        os.close(handle)
        raise
    return handle, locked


def _holder(handle: int) -> str:
    """Who wrote its name into a lock file, in words."""
    try:
        found = json.loads(os.pread(handle, 1 << 16, 0))
        words = f"process {found['pid']} on {found['host']} since {found['since']} ({found['command']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has locked it this moment
        return "another process"
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


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
            raise UserError(
                f"{path}: this file system is read-only; write to another place, in the container to out/"
            ) from error
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{path}: {_FULL[error.errno]}; make room or write to another place, and run again. {left}"
        ) from error


def abandoned(path: str | os.PathLike) -> list[Path]:
    """Temporaries of `path` that nobody is writing: a run that was to make it has been killed."""
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
                # held; or a file system without locks, where the name tells the process
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) and match[1] and _has_ended(match[1]):
                    found.append(path.parent / name)
    return found


def _owner() -> str:
    """This process in a file's name: host, process id and the time at which it started, since ids are given again."""
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return f"{host}-{os.getpid()}-{_started(os.getpid())}"


def _started(pid: int) -> int:
    """When a process of this machine started, in ticks since boot; 0 if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _has_ended(owner: str) -> bool:
    """Whether the process that a name tells was on this host, and is there no more."""
    host, pid, started = owner.split("-")
    return host == _owner().split("-")[0] and _started(int(pid)) != int(started)


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


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes; of more than 4 GiB, which would take long, that of 1024 blocks spread over it and of its size, as `blocks:` and hex digits."""
    size, block = os.stat(path).st_size, 1 << 16
    if size <= _HASHED:
        return sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(1024):
            file.seek(i * (size - block) // 1023)
            digest.update(file.read(block))
    return f"blocks:{digest.hexdigest()}"


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new empty file beside `path`, locked for as long as we live: what is not locked is left over from a killed run, and goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in abandoned(path):
        stale.unlink(missing_ok=True)
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (
                errno.EWOULDBLOCK,
                errno.EACCES,
            ):  # a file system without locks: the name tells who writes it
                owned = f"{name.removesuffix('.tmp')}.{_owner()}.tmp"
                os.rename(name, owned)
                name = owned
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


@contextlib.contextmanager
def regular(path: str | os.PathLike, what: str = "file") -> Iterator[BinaryIO]:
    """Open a regular file for reading. A FIFO, a device or a directory is refused without being opened, so that nothing can block.

    Raises:
        UserError: it does not exist, cannot be read, or is not a regular file; `what` names what was expected.
    """
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise UserError(f"{path}: a folder, not a {what}")
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: a device or pipe, not a {what}; give a regular file")
        handle = os.open(
            path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        )  # what replaces it meanwhile cannot block either
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {_unreadable(error, what)}") from error
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UserError(f"{path}: a device or pipe, not a {what}; give a regular file")
        yield file


def _unreadable(error: Exception, what: str) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return f"no such {what}"
    if number in (errno.EACCES, errno.EPERM):
        return f"no permission to read this {what}; give yourself read access (chmod, chown), or run as its owner"
    if number == errno.ENAMETOOLONG:
        return f"no {what}: the name is longer than a file name can be"
    if number == errno.ELOOP:
        return f"no such {what}: its symbolic links form a loop"
    return f"no {what} can have this name ({error})" if number is None else f"cannot be read ({os.strerror(number)})"
