"""Run scripts as processes that are forked from a server with torch and Lightning imported.

A script then starts in a tenth of a second instead of 4 s (cu117) or 8 s (modern). Otherwise the
process is like one that a user starts: its own arguments, folder, environment, streams, signals and
exit status. Not tested this way: importing, and what Python does at exit.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from rwkv.train.runtime.lightning import rank_zero_only
from tests.waiting import LIMIT

ROOT = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
# those of the scripts' imports that take a hundredth of a second or more
_PRELOADED = ["matplotlib.figure", "rwkv.cli", "rwkv.data.convert.pipeline", "rwkv.doctor", "rwkv.export"]
_PRELOADED += ["rwkv.terminal", "rwkv.train.fit", "tests.forked"]
_RESERVED: list[socket.socket] = []  # ports of free_port


def start_server() -> None:
    """Start the server, unless it is running. It imports in the background."""
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])):
        multiprocessing.forkserver.ensure_running()


class Process:
    """A running script, with the part of subprocess.Popen's interface that tests use. Its output
    goes to files, so that it never waits for a reader.
    """

    def __init__(self, argv: list, cwd: Path, environment: dict | None = None, stdin: str = ""):
        self.args = [str(word) for word in argv]
        self._files = [tempfile.NamedTemporaryFile("w+", encoding="utf-8") for _ in range(3)]  # noqa: SIM115
        self._files[0].write(stdin)
        self._files[0].flush()
        start_server()
        self._process = _CONTEXT.Process(
            target=_main,
            args=(self.args, str(cwd), dict(environment or os.environ), [file.name for file in self._files]),
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = LIMIT) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float = LIMIT) -> tuple[str, str]:
        """Wait for the end; returns what was printed to stdout and stderr."""
        self.wait(timeout)
        return tuple(Path(file.name).read_text(encoding="utf-8") for file in self._files[1:])

    def result(self, timeout: float = LIMIT) -> subprocess.CompletedProcess:
        """Wait for the end, as subprocess.run does."""
        printed = self.communicate(timeout)
        return subprocess.CompletedProcess(self.args, self.returncode, *printed)


def _main(argv: list[str], cwd: str, environment: dict[str, str], streams: list[str]) -> None:
    for number, (path, mode) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        opened = os.open(path, mode | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    gc.freeze()  # garbage collections skip what the server has imported, and leave its memory shared
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("RANK", 0))  # Lightning reads it when it is imported
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except KeyboardInterrupt:  # Python then ends by the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


def free_port() -> int:
    """A port that no process listens on: below those that the system gives to outgoing
    connections, and above those of Ray's workers. This process keeps it reserved, so that neither a
    connection nor another test process takes it before the caller's server, which has to set
    SO_REUSEADDR, listens.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        reserved = socket.socket()
        with contextlib.suppress(OSError):
            reserved.bind(("", random.SystemRandom().randrange(20000, first) if first > 22000 else 0))
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _RESERVED.append(reserved)
            return reserved.getsockname()[1]
        reserved.close()
