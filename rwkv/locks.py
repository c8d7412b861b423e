"""Lock files: one process at a time uses a run's folder or an output."""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from rwkv.errors import UserError
from rwkv.files import disk_errors

_held_locks: set[int] = set()  # file descriptors of the locks held by this process


def _release_inherited_locks() -> None:
    while _held_locks:
        os.close(_held_locks.pop())


os.register_at_fork(after_in_child=_release_inherited_locks)  # children must not keep locks alive


@contextlib.contextmanager
def exclusive(path: str | os.PathLike, what: str | os.PathLike, advice: str = "choose another one") -> Iterator[None]:
    """Hold a lock file while the block runs.

    The lock is a flock: the kernel releases it when the process ends, so a lock file left by a
    killed process does not block. Afterwards the file is removed, with the folders created for it.
    If the file system does not support locks, a warning is printed and the block runs.

    Args:
        path: the lock file; it contains host, process id, command and start time of the holder.
        what: the protected folder or output, for messages.
        advice: what the user can do besides waiting.

    Raises:
        UserError: another process holds the lock (the message names it), or the file cannot be
            written.
    """
    path = Path(path)
    made = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        with disk_errors(path, "Nothing was written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, locked = _locked(path, what, advice)
    except UserError:
        _remove_empty(made)
        raise
    except OSError as error:
        _remove_empty(made)
        raise UserError(
            f"{what}: cannot be written to ({error.strerror}: {error.filename or path}); {advice}"
        ) from error
    _held_locks.add(handle)
    try:
        if not locked:
            print(
                f"warning: {what}: this file system does not support locks; make sure that no other process uses it",
                file=sys.stderr,
                flush=True,
            )
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may have been moved or replaced
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                path.unlink()
        _held_locks.discard(handle)
        os.close(handle)
        _remove_empty(made)


def _locked(path: Path, what: str | os.PathLike, advice: str) -> tuple[int, bool]:
    """Open, lock and fill in the lock file: (descriptor, whether it is locked). Raises UserError if
    another process holds it.
    """
    while True:
        handle, locked = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = _holder(handle)
                os.close(handle)
                raise UserError(f"{what}: in use by {holder}. Wait until it ends, stop it, or {advice}") from error
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
    except OSError:  # the disk is full
        path.unlink(missing_ok=True)
        os.close(handle)
        raise
    return handle, locked


def _holder(handle: int) -> str:
    """Description of the holder of a lock file."""
    try:
        found = json.loads(os.pread(handle, 1 << 16, 0))
        words = f"process {found['pid']} on {found['host']} since {found['since']} ({found['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        # the holder has locked the file, but not yet written to it
        return "another process"
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, until one is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
