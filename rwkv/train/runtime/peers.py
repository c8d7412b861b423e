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
import torch.distributed as dist

from rwkv.errors import UserError
from rwkv.train.runtime import launcher
from rwkv.train.runtime.process import environment

_STARTED_BY = "RWKV_STARTED_BY"  # environment variable of ranks started by rank 0: its process id
_SET_PDEATHSIG = 1  # of prctl(2)
# In which rank 0 ends by itself after another has failed. It may be saving, or importing DeepSpeed
# before the ranks have met.
_GRACE_SECONDS, _GRACE_SECONDS_AT_START = 120.0, 30.0
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

    If one of them fails, and this process has not ended by itself two minutes later (30 s before
    the ranks have met) because it waits for that rank in a collective operation, it is ended with
    exit status 1. Lightning would kill it within 5 s, before it can report an error of its own.

    Args:
        ranks: number of processes on this machine.
        nodes: number of machines.

    Raises:
        UserError: this process has no command that starts its program.
    """
    if ranks == 1 or launcher.is_used():
        yield
        return
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    command, left = _command(ranks), threading.Event()
    with _reserved_port() as port:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(port))
        os.environ["NODE_RANK"] = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
        os.environ["WORLD_SIZE"] = str(ranks * nodes)
        os.environ["LOCAL_RANK"] = "0"  # from this Lightning concludes that the ranks have been started
        with environment(_STARTED_BY, str(os.getpid())):
            theirs = {name: value for name, value in os.environ.items() if name != "RANK"}  # 0, if set
            children = [subprocess.Popen(command, env=theirs | {"LOCAL_RANK": str(i)}) for i in range(1, ranks)]
        threading.Thread(target=_watch, args=(children, left), name="ranks", daemon=True).start()
        try:
            yield
        finally:
            left.set()


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port on which only torch's store can listen in this block. Without the reservation, a
    connection of any process could take it in the second until the store listens.
    """
    with socket.socket() as held:
        held.bind(("", 0))
        # From now on sockets with this option may use the port, too: the store's, but not those of
        # outgoing connections.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield held.getsockname()[1]


def _command(ranks: int) -> list[str]:
    """The command of this process. Raises UserError if there is none that starts its program."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    if hasattr(sys, "ps1") or not (spec or os.path.isfile(sys.argv[0])):  # ps1: a prompt or a notebook
        raise UserError(
            f"--devices {ranks}: rank 0 starts the other ranks with its own command, which an interactive Python, a notebook and python -c"
            " do not have; write the program into a file and run that, or use one device"
        )
    return [sys.executable, *(["-m", spec.name] if spec else [os.path.abspath(sys.argv[0])]), *sys.argv[1:]]


def _watch(children: list[subprocess.Popen], left: threading.Event) -> None:
    """Wait until `left` is set, or until a child has failed; then end this process if `left` is not
    set within the grace period.
    """
    while not left.wait(1):
        for rank, child in enumerate(children, 1):
            if not child.poll():
                continue
            seconds = _GRACE_SECONDS if dist.is_initialized() else _GRACE_SECONDS_AT_START
            if not left.wait(seconds):
                print(
                    f"error: rank {rank} of this machine (process {child.pid}) ended with exit status {child.returncode}, and rank 0 has waited"
                    f" for it for {seconds:g} s. See its error message; {_ADVICE}",
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
