"""The processes of one run: none outlives the one that started it, and when one ends the others report it and end."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

from rwkv.errors import UserError

_STARTED_BY = "RWKV_STARTED_BY"  # in the environment of the ranks that rank 0 starts: its process id
_SET_PDEATHSIG = 1  # of prctl(2)
# Error messages of gloo, NCCL and torch's store when another process has ended.
_SIGNS = (
    *(
        "Connection closed by peer",
        "Connection reset by peer",
        "Connection refused",
        "Broken pipe",
        "Socket Timeout",
        "Timed out waiting",
    ),
    *(
        "NCCL communicator was aborted",
        "remote process exited",
        "ncclRemoteError",
        "Socket closed",
        "failed to connect",
    ),
)


def end_with_parent() -> None:
    """End a rank that rank 0 started as soon as rank 0 ends; otherwise it would hold GPU memory until a collective operation times out."""
    parent = os.environ.get(_STARTED_BY)
    if not parent or "LOCAL_RANK" not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it ended before
        os._exit(1)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Ranks that are started in this block end with this process (`end_with_parent`)."""
    before = os.environ.get(_STARTED_BY)
    os.environ[_STARTED_BY] = str(os.getpid())
    try:
        yield
    finally:
        if before is None:
            del os.environ[_STARTED_BY]
        else:
            os.environ[_STARTED_BY] = before


@contextlib.contextmanager
def explained(ranks: int) -> Iterator[None]:
    """With several ranks: an error caused by the end of another rank becomes a UserError, and a UserError that Lightning has wrapped is raised again."""
    try:
        yield
    except Exception as error:
        if ranks < 2 or isinstance(error, UserError):
            raise
        chain: list[BaseException] = [error]
        while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
            chain.append(inner)
        for inner in chain:
            if isinstance(inner, UserError):
                raise inner from None
        lines = [line.strip() for line in str(error).splitlines() if any(sign in line for sign in _SIGNS)]
        if not lines:
            raise
        raise UserError(
            f"another process of this run has ended or cannot be reached ({lines[0][:200]}). See its own message; if it has none, it was killed, perhaps for lack"
            " of memory (see dmesg). Run the same command to continue from the last saved state"
        ) from error
