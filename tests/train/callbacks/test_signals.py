"""A signal ends a run after saving, also when repeated within two seconds; a later one stops it
without saving.
"""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest

from rwkv.train.resume import state_files

FLAGS = {
    "ctx_len": 4,
    "micro_bsz": 1,
    "epoch_steps": 100000,
    "epoch_count": 1,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "fp32",
    "save_every": 100000,
}


@pytest.fixture
def arguments(make_base, make_data, tmp_path):
    """Flags of a run that trains until it is stopped, and saves only then."""
    flags = FLAGS | {"load_model": make_base(), "data_file": make_data(300), "proj_dir": tmp_path / "run"}
    return [str(word) for key, value in flags.items() for word in (f"--{key}", value)]


def wait_for_steps(process, folder, count=3):
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_saved(folder):
    """Whether the newest training state is of the last step."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    return state_files.newest(folder).step == last


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)]
)
def test_repeated_signal_saves(arguments, tmp_path, root, numbers):
    command = [sys.executable, str(root / "scripts/finetune.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_steps(process, tmp_path / "run")
    for number in numbers:
        process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + numbers[0], printed
    assert "finishing this step, then saving" in printed
    assert printed.count("would be lost") == 1
    assert is_saved(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_sighup_and_sigusr1_save(arguments, tmp_path, root, number):
    command = [sys.executable, str(root / "scripts/finetune.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_steps(process, tmp_path / "run")
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, printed
    assert is_saved(tmp_path / "run")


def test_closed_terminal_saves(arguments, tmp_path, root):
    """As when a window is closed or ssh disconnects: SIGHUP, and every later write to the terminal
    fails.
    """
    controller, terminal = pty.openpty()

    def attach():
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    command = [sys.executable, str(root / "scripts/finetune.py"), *arguments]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=attach, pass_fds=[terminal]
    )
    os.close(terminal)
    os.set_blocking(controller, False)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() or (tmp_path / "run/metrics.jsonl").stat().st_size < 1000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            os.read(controller, 1 << 16)  # otherwise the run blocks on a full terminal buffer
        except BlockingIOError:
            time.sleep(0.02)
    os.close(controller)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert is_saved(tmp_path / "run")


def test_nohup_ignores_sighup(arguments, tmp_path, root):
    command = ["nohup", sys.executable, str(root / "scripts/finetune.py"), *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    )
    wait_for_steps(process, tmp_path / "run")
    process.send_signal(signal.SIGHUP)
    count = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    wait_for_steps(process, tmp_path / "run", count + 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert is_saved(tmp_path / "run")


def test_closed_pipe_does_not_end_run(arguments, tmp_path, root):
    command = [sys.executable, str(root / "scripts/finetune.py"), *arguments, "--max_steps", "20"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert state_files.newest(tmp_path / "run").step == 20


def test_signal_to_make_process_group(arguments, tmp_path, root):
    """make forwards the signal, so that the run receives it twice."""
    command = ["make", "-C", str(root), "finetune", f"PY={sys.executable}", f"ARGS={' '.join(arguments)}"]
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
    )
    wait_for_steps(process, tmp_path / "run")
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.monotonic() + 30  # make may end before the run does
    while "stopped at step" not in printed and not state_files.states(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert is_saved(tmp_path / "run")


LATER_SIGNAL = """
import signal, sys, time
from types import SimpleNamespace
from rwkv.train.callbacks import signals
signals.DUPLICATE_SECONDS = 0.2
handler = signals.Signals(lambda: 7)
handler.on_train_start(None, SimpleNamespace(stop=False))
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP), (signal.SIGINT, -2)]
)
def test_later_signal_stops_without_saving(root, number, status):
    process = subprocess.Popen(
        [sys.executable, "-c", LATER_SIGNAL], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == status  # killed by the signal
    assert "WITHOUT saving (7 steps would be lost)" in printed
