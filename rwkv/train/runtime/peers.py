"""The processes of a run: ranks end when the process that started them ends, and report when
another rank has ended.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager

from rwkv.errors import UserError
from rwkv.train.runtime.process import environment

_STARTED_BY = "RWKV_STARTED_BY"  # environment variable of ranks started by rank 0: its process id
_SET_PDEATHSIG = 1  # of prctl(2)
# error messages of gloo, NCCL and torch's store when another process has ended
_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket Timeout",
    "Timed out waiting",
    "Timed out after",
    "has timed out",
    "wait timeout",
    "NCCL communicator was aborted",
    "remote process exited",
    "ncclRemoteError",
    "Socket closed",
    "failed to connect",
)


def end_with_parent() -> None:
    """Kill this process when rank 0, which started it, ends; otherwise it would keep GPU memory
    until a collective operation times out.
    """
    parent = os.environ.get(_STARTED_BY)
    if not parent or "LOCAL_RANK" not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it has already ended
        os._exit(1)


def children_end_with_this_process() -> AbstractContextManager[None]:
    """Make ranks started in this block end with this process (see `end_with_parent`)."""
    return environment(_STARTED_BY, str(os.getpid()))


@contextlib.contextmanager
def explain_errors(ranks: int) -> Iterator[None]:
    """With several ranks: convert errors caused by the end of another rank to UserErrors, and
    re-raise UserErrors that Lightning has wrapped.
    """
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
            f"another process of this run has ended or cannot be reached ({lines[0][:200]}). See its error message; if there is none, it was killed, perhaps"
            " because it ran out of memory (see dmesg). Run the same command to resume from the last saved state"
        ) from error
