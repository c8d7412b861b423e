"""If one process of a run ends, the others end soon after with an error message."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from rwkv.errors import UserError
from rwkv.train.runtime import peers, process
from tests.train.small_runs import wait_for_steps
from tests.waiting import wait_until

FLAGS = {
    "ctx_len": 4,
    "micro_bsz": 1,
    "epoch_steps": 100000,
    "epoch_count": 1,
    "random_seed": 1,
    "accelerator": "cpu",
    "devices": 2,
}


def alive(pid):
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    result = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in result.stdout.split()]


@pytest.fixture
def two_ranks(start, make_base, make_data, tmp_path):
    """A run of two processes; the first starts the second."""
    flags = FLAGS | {"load_model": make_base(), "data_file": make_data(300), "proj_dir": tmp_path / "run"}
    process = start("finetune.py", *(word for key, value in flags.items() for word in (f"--{key}", value)))
    yield process
    for pid in children(process.pid):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("training", [False, True], ids=["before the ranks have met", "while they train"])
def test_killed_parent_ends_ranks(two_ranks, tmp_path, training):
    child = wait_until(lambda: children(two_ranks.pid), two_ranks)[0]
    if training:
        wait_for_steps(tmp_path / "run", 3, two_ranks)
    two_ranks.send_signal(signal.SIGKILL)
    two_ranks.wait()
    wait_until(lambda: not alive(child))


def test_killed_rank_ends_others(two_ranks, tmp_path):
    wait_for_steps(tmp_path / "run", 3, two_ranks)
    os.kill(children(two_ranks.pid)[0], signal.SIGKILL)
    printed = "".join(two_ranks.communicate())
    assert two_ranks.returncode == 1
    assert "error: another process of this run has ended or cannot be reached" in printed
    assert "Traceback" not in printed


FAILED_RANK = """
import os, sys, time
from rwkv import compat
from rwkv.train.runtime import peers
if "LOCAL_RANK" in os.environ:
    sys.exit(3)
def fit(*arguments):
    time.sleep({seconds})
    raise RuntimeError("Connection closed by peer")
compat.fit = fit
peers._GRACE_SECONDS_AT_START = {grace}
exec(open({script!r}).read())  # unlike runpy it leaves sys.argv, the command of the other ranks
"""


@pytest.mark.parametrize(
    ("seconds", "grace", "expected"),
    [
        (6, 120, "another process of this run has ended or cannot be reached"),  # Lightning would end it after 5 s
        (10000, 0.1, r"rank 1 of this machine \(process \d+\) ended with exit status 3, and rank 0 has waited"),
    ],
    ids=["rank 0 notices", "rank 0 hangs"],
)
def test_failed_rank(seconds, grace, expected, start, make_base, make_data, tmp_path, root):
    flags = FLAGS | {"load_model": make_base(), "data_file": make_data(300), "proj_dir": tmp_path / "run"}
    program = tmp_path / "program.py"
    script = str(root / "scripts/finetune.py")
    program.write_text(FAILED_RANK.format(seconds=seconds, grace=grace, script=script))
    result = start(program, *(word for key, value in flags.items() for word in (f"--{key}", value))).result()
    assert result.returncode == 1
    assert re.search(f"^error: {expected}", result.stderr, re.M), result.stderr
    assert "Traceback" not in result.stderr


def test_disk_full_with_two_ranks(start, make_base, make_data, tmp_path, root):
    flags = FLAGS | {"load_model": make_base(), "data_file": make_data(300), "proj_dir": tmp_path / "run"}
    limited = tmp_path / "limited.py"
    limited.write_text(
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        f"runpy.run_path({str(root / 'scripts/finetune.py')!r}, run_name='__main__')"
    )
    result = start(limited, *(word for key, value in flags.items() for word in (f"--{key}", value))).result()
    assert result.returncode == 1
    assert re.search(r"^error: .*: the file exceeds the maximum file size; .*run again", result.stderr, re.M), (
        result.stderr
    )
    assert "Traceback" not in result.stderr


def test_connection_errors_recognised():
    with pytest.raises(RuntimeError, match="shapes"), peers.explain_errors(2):
        raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="Connection closed"), peers.explain_errors(1):
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(UserError, match="Connection closed by peer"), peers.explain_errors(2):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:598] Connection closed by peer [127.0.0.1]:1")


TIMEOUTS = [  # of torch 1.13.1 and 2.13
    "The client socket has timed out after 3s while trying to connect to (127.0.0.1, 29999).",
    "Socket Timeout",
    "The client socket has timed out after 3000ms while trying to connect to (127.0.0.1, 29999).",
    "Timed out after 4 seconds waiting for clients. 1/2 clients joined.",
    "wait timeout after 3000ms, keys: /x",
]


@pytest.mark.parametrize("message", TIMEOUTS)
def test_rendezvous_timeout_recognised(message):
    with (
        pytest.raises(UserError, match="another process of this run has ended or cannot be reached"),
        peers.explain_errors(2),
    ):
        raise TimeoutError(message)


@pytest.mark.parametrize("ranks", [1, 2], ids=["one rank", "two ranks of a launcher"])
def test_no_ranks_started(ranks, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if ranks == 2:
        monkeypatch.setenv("LOCAL_RANK", "0")
    before, running = dict(os.environ), set(children(os.getpid()))
    with peers.started(ranks, 1):
        assert dict(os.environ) == before
        assert set(children(os.getpid())) <= running  # one of an earlier test may end meanwhile
    peers.end_with_parent()  # no effect in a process that no rank started


def test_started_rank(monkeypatch, tmp_path):
    """On the second of two machines; only the store can listen on the port until the block ends."""
    for name in ("LOCAL_RANK", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GROUP_RANK", "1")
    monkeypatch.setenv("RANK", "0")
    names = ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_PORT", "RWKV_STARTED_BY", "RANK")
    shown = " ".join(f"${name}" for name in names)
    command = ["sh", "-c", f"echo $$ {shown} > {tmp_path}/new && mv {tmp_path}/new {tmp_path}/rank"]
    monkeypatch.setattr(peers, "_command", lambda ranks: command)
    with process.restored(), peers.started(2, 2):
        wait_until((tmp_path / "rank").exists)
        pid, *found = map(int, (tmp_path / "rank").read_text().split())
        port = int(os.environ["MASTER_PORT"])
        assert found == [1, 4, 1, port, os.getpid()]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert store.get("key") == b"value"
        del store
    wait_until(lambda: not alive(pid))


@pytest.mark.parametrize("kind", ["prompt", "python -c"])
def test_no_command_to_start_ranks_with(monkeypatch, kind):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    main = SimpleNamespace(__spec__=None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [__file__ if kind == "prompt" else "-c", "--flag"])
    if kind == "prompt":
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with (
        pytest.raises(UserError, match="--devices 2: rank 0 starts the other ranks with its own command"),
        peers.started(2, 1),
    ):
        pass
    monkeypatch.delattr(sys, "ps1", raising=False)
    monkeypatch.setattr(sys, "argv", [__file__, "--flag"])
    assert peers._command(2) == [sys.executable, __file__, "--flag"]
    main.__spec__ = SimpleNamespace(name="package.program")
    assert peers._command(2) == [sys.executable, "-m", "package.program", "--flag"]
