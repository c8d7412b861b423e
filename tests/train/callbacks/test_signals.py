"""A signal ends a run after saving, also when repeated within two seconds; a later one stops it
without saving.
"""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from rwkv.config import TrainConfig
from rwkv.train.callbacks import signals
from rwkv.train.fit import fit
from rwkv.train.resume import state_files
from tests.train.small_runs import wait_for_steps
from tests.waiting import LIMIT, wait_until

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


def is_saved(folder):
    """Whether the newest training state is of the last step."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    return state_files.newest(folder).step == last


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)]
)
def test_repeated_signal_saves(start, arguments, tmp_path, numbers):
    process = start("finetune.py", *arguments)
    wait_for_steps(tmp_path / "run", 3, process)
    for number in numbers:
        process.send_signal(number)
    printed = "".join(process.communicate())
    # two threads may take the two signals, and either first
    names = {number: "Ctrl-C" if number == signal.SIGINT else number.name for number in numbers}
    first = next(number for number in numbers if f"{names[number]}: finishing this step, then saving" in printed)
    assert process.returncode == 128 + first, printed
    assert printed.count("would be lost") == 1
    assert is_saved(tmp_path / "run")


DUPLICATE_AT_THE_END = """
import os, runpy, sys
from rwkv import compat
from rwkv.train.callbacks import metrics, signals
signals.DUPLICATE_SECONDS = 1000  # however long saving takes
fit = compat.fit

def again(*_):
    os.kill(os.getpid(), number)

def fit_and_again(*arguments):
    fit(*arguments)
    again()

number = int(sys.argv.pop(1))
if sys.argv.pop(1) == "report":
    metrics.plot = again  # drawn after the training has ended
else:
    compat.fit = fit_and_again
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize(
    ("number", "when"),
    [
        (signal.SIGINT, "report"),
        (signal.SIGTERM, "report"),
        (signal.SIGHUP, "report"),
        (signal.SIGINT, "training's end"),
        (signal.SIGTERM, "training's end"),
    ],
)
def test_duplicate_after_saving_is_ignored(start, arguments, tmp_path, root, number, when):
    (tmp_path / "program.py").write_text(DUPLICATE_AT_THE_END)
    process = start(tmp_path / "program.py", int(number), when, root / "scripts/finetune.py", *arguments)
    wait_for_steps(tmp_path / "run", 3, process)
    process.send_signal(number)
    printed = "".join(process.communicate())
    assert process.returncode == 128 + number, printed
    assert "of 100,000 and saved" in printed
    assert is_saved(tmp_path / "run")


def test_signal_in_the_last_step(make_base, make_data, tmp_path, monkeypatch):
    """The run is complete, and the handlers of the calling program are restored."""
    write = state_files.write

    def write_after_signal(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(state_files, "write", write_after_signal)
    before = signal.signal(signal.SIGTERM, own := lambda *_: None)
    try:
        flags = FLAGS | {"load_model": str(make_base()), "data_file": str(make_data(300)), "epoch_steps": 2}
        result = fit(TrainConfig(**flags, proj_dir=str(tmp_path / "run")))
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.steps, result.checkpoint.name) == (2, "rwkv-0.pth")


@pytest.fixture
def listening():
    """The callback in a training, and the handlers that Lightning would restore."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    outer, callback = dict(before), signals.Signals()
    trainer = SimpleNamespace(_signal_connector=SimpleNamespace(_original_handlers=outer))
    callback.on_train_start(trainer, SimpleNamespace(stop=False))
    yield callback, outer
    for number, handler in before.items():
        signal.signal(number, handler)


def test_second_signal_restores_handlers(listening, monkeypatch):
    """After it, Lightning restores the handlers from before the training, as without signals."""
    callback, outer = listening
    monkeypatch.setattr(signals, "DUPLICATE_SECONDS", 0)
    before = dict(outer)
    signal.raise_signal(signal.SIGINT)
    assert set(outer.values()) == {callback._handle}
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert outer == before


def test_signal_during_the_handler(listening, monkeypatch, capsys):
    callback, _ = listening
    monkeypatch.setattr(callback, "_keep", lambda: signal.raise_signal(signal.SIGTERM))
    signal.raise_signal(signal.SIGTERM)
    assert capsys.readouterr().out.count("would be lost") == 1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_sighup_and_sigusr1_save(start, arguments, tmp_path, number):
    process = start("finetune.py", *arguments)
    wait_for_steps(tmp_path / "run", 3, process)
    process.send_signal(number)
    printed = "".join(process.communicate())
    assert process.returncode == 128 + number, printed
    assert is_saved(tmp_path / "run")


IN_TERMINAL = """
import fcntl, os, runpy, sys, termios
os.setsid()
terminal = os.open(sys.argv.pop(1), os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
for number in range(3):
    os.dup2(terminal, number)
os.close(terminal)
sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_closed_terminal_saves(start, arguments, tmp_path, root):
    """As when a window is closed or ssh disconnects: SIGHUP, and every later write to the terminal
    fails.
    """
    controller, terminal = pty.openpty()
    (tmp_path / "program.py").write_text(IN_TERMINAL)
    process = start(tmp_path / "program.py", os.ttyname(terminal), root / "scripts/finetune.py", *arguments)
    os.set_blocking(controller, False)
    metrics = tmp_path / "run/metrics.jsonl"

    def has_steps():
        with contextlib.suppress(BlockingIOError):
            os.read(controller, 1 << 16)  # otherwise the run blocks on a full terminal buffer
        return metrics.exists() and metrics.read_text().count("\n") >= 3

    wait_until(has_steps, process)
    os.close(terminal)
    os.close(controller)
    assert process.wait() == 128 + signal.SIGHUP
    assert is_saved(tmp_path / "run")


WITH_NOHUP = """
import runpy, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does before it starts the command
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_nohup_ignores_sighup(start, arguments, tmp_path, root):
    (tmp_path / "program.py").write_text(WITH_NOHUP)
    process = start(tmp_path / "program.py", root / "scripts/finetune.py", *arguments)
    wait_for_steps(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGHUP)
    count = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    wait_for_steps(tmp_path / "run", count + 20, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 143
    assert is_saved(tmp_path / "run")


def test_closed_pipe_does_not_end_run(arguments, tmp_path, root):
    command = [sys.executable, str(root / "scripts/finetune.py"), *arguments, "--max_steps", "20"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(LIMIT) == 0
    assert state_files.newest(tmp_path / "run").step == 20


def test_signal_to_make_process_group(arguments, tmp_path, root):
    """make forwards the signal, so that the run receives it twice."""
    command = ["make", "-C", str(root), "finetune", f"PY={sys.executable}", f"ARGS={' '.join(arguments)}"]
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
    )
    wait_for_steps(tmp_path / "run", 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=LIMIT)  # also waits for the run, which may end after make: both write to the pipe
    assert process.returncode != 0
    assert is_saved(tmp_path / "run")


LATER_SIGNAL = """
import signal, sys
from types import SimpleNamespace
from rwkv.train.callbacks import signals
clock = SimpleNamespace(now=0.0)
signals.time = SimpleNamespace(monotonic=lambda: clock.now)
trainer = SimpleNamespace(_signal_connector=SimpleNamespace(_original_handlers={}))
signals.Signals(lambda: 7).on_train_start(trainer, SimpleNamespace(stop=False))
number = int(sys.argv[1])
signal.raise_signal(number)
clock.now = signals.DUPLICATE_SECONDS - 0.1
signal.raise_signal(number)
print("still running", flush=True)
clock.now = signals.DUPLICATE_SECONDS + 0.1
signal.raise_signal(number)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_later_signal_stops_without_saving(start, tmp_path, number):
    (tmp_path / "program.py").write_text(LATER_SIGNAL)
    result = start(tmp_path / "program.py", int(number)).result()
    assert result.returncode == -number, result.stderr  # killed by the signal
    assert "WITHOUT saving (7 steps would be lost)" in result.stdout
    assert result.stdout.endswith("still running\n")
