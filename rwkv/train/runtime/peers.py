"""The processes of a run on one machine: rank 0 starts the others, which end when it ends; a rank
reports when another has ended.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import torch

from rwkv.errors import UserError
from rwkv.train.runtime import launcher
from rwkv.train.runtime.process import environment

_STARTED_BY = "RWKV_STARTED_BY"  # environment variable of ranks started by rank 0: its process id
_SET_PDEATHSIG = 1  # of prctl(2)
_GRACE_SECONDS = 120.0  # long enough for rank 0 to save, and to report an error of its own
_ADVICE = (
    "if there is none, it was killed, perhaps because it ran out of memory (see dmesg). Run the same command to resume from the last"
    " saved state"
)
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


@contextlib.contextmanager
def started(ranks: int, nodes: int) -> Iterator[None]:
    """Start the other ranks of this machine with the command of this process, unless a launcher has
    started them; they end with this process (see `end_with_parent`). Lightning's trainer must be
    created in this block.

    If one of them fails, and this process has not ended by itself two minutes later because it
    waits for that rank in a collective operation, it is ended with exit status 1. Lightning would
    kill it within 5 s, before it can report an error of its own.

    Args:
        ranks: number of processes on this machine.
        nodes: number of machines.
    """
    if ranks == 1 or launcher.is_used():
        yield
        return
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ.setdefault("NODE_RANK", "0")
    os.environ["WORLD_SIZE"] = str(ranks * nodes)
    os.environ["LOCAL_RANK"] = "0"  # from this Lightning concludes that the ranks have been started
    with environment(_STARTED_BY, str(os.getpid())):
        children = [subprocess.Popen(_command(), env=os.environ | {"LOCAL_RANK": str(i)}) for i in range(1, ranks)]
    left = threading.Event()
    threading.Thread(target=_watch, args=(children, left), name="ranks", daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _command() -> list[str]:
    spec = sys.modules["__main__"].__spec__  # of python -m
    return [sys.executable, *(["-m", spec.name] if spec else [os.path.abspath(sys.argv[0])]), *sys.argv[1:]]


def _watch(children: list[subprocess.Popen], left: threading.Event) -> None:
    """Wait until `left` is set, or until a child has failed; then end this process if `left` is not
    set within the grace period.
    """
    while not left.wait(1):
        for rank, child in enumerate(children, 1):
            if child.poll() and not left.wait(_GRACE_SECONDS):
                print(
                    f"error: rank {rank} of this machine (process {child.pid}) ended with exit status {child.returncode}, and rank 0 has waited"
                    f" for it for {_GRACE_SECONDS:g} s. See its error message; {_ADVICE}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)  # the main thread cannot be interrupted in a collective operation


@contextlib.contextmanager
def explain_errors(ranks: int) -> Iterator[None]:
    """With several ranks: convert errors caused by the end of another rank to UserErrors."""
    try:
        yield
    except Exception as error:
        if ranks < 2 or isinstance(error, UserError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if any(sign in line for sign in _SIGNS)]
        if not lines:
            raise
        raise UserError(
            f"another process of this run has ended or cannot be reached ({lines[0][:200]}). See its error message; {_ADVICE}"
        ) from error
