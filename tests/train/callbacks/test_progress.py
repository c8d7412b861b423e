"""Progress of a run in a terminal and in a log, with a simulated clock."""

import io
import itertools
import re

import pytest

from rwkv.train.callbacks import progress
from rwkv.train.callbacks.progress import Progress, Speed
from rwkv.train.console import duration


class Clock:
    """A clock that a test advances."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    simulated = Clock()
    monkeypatch.setattr(progress.time, "monotonic", simulated)
    return simulated


def steps(shown, clock, count, seconds, loss=2.0):
    for _ in range(count):
        clock.now += seconds
        shown.step(loss, ["val 2.345", "1,234 tokens/s", "lr 6.00e-04", "0.36 GB"])


def test_log_line_per_minute(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    shown = Progress(1000, 0)
    steps(shown, clock, 1000, 0.5)
    shown.close()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    logged = [int(re.search(r"step ([\d,]+) of 1,000", line)[1].replace(",", "")) for line in lines]
    assert (logged[0], logged[-1]) == (1, 1000)
    assert all(119 <= b - a <= 121 for a, b in itertools.pairwise(logged[1:-1]))  # 120 steps per minute
    assert "about 8 min left" in lines[1]
    assert "(100%): loss 2.000, val 2.345, 1,234 tokens/s" in lines[-1]


def test_speed_is_that_of_the_last_fifty_steps():
    speed = Speed()
    assert speed.add(100) == pytest.approx(100)
    assert speed.add(300) == pytest.approx(150)  # two steps of the same tokens: 1/100 and 1/300 s per token
    for _ in range(50):
        last = speed.add(200)
    assert last == pytest.approx(200)
    assert 0 < speed.add(0.0) < 3  # a process that was stopped for an hour


def test_running_mean_ignores_nan(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    shown = Progress(4, 0)
    for loss in (1.0, None, 3.0, 5.0):
        steps(shown, clock, 1, 100, loss)
    assert [re.search(r"loss ([\d.]+)", line)[1] for line in log.getvalue().splitlines()] == [
        "1.000",
        "1.000",
        "2.000",
        "3.000",
    ]


def test_other_ranks_are_quiet(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    shown = Progress(10, 0, quiet=True)
    steps(shown, clock, 10, 100)
    shown.close()
    assert log.getvalue() == ""


@pytest.mark.parametrize("columns", [80, 200])
def test_bar_fits_terminal(clock, monkeypatch, columns):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setattr("sys.stderr", terminal)
    shown = Progress(6000, 50)
    shown._bar.mininterval = 0
    steps(shown, clock, 86, 1)
    shown.close()
    printed = terminal.getvalue()
    bars = [line for line in re.split(r"[\r\n]+", printed) if "/6000 [" in line]
    assert bars
    for bar in bars:
        assert len(bar) <= columns
        assert "loss 2.000" in bar or bar is bars[0]
        assert len(re.search(r"\|(.*)\|", bar)[1]) >= 8
    assert ("0.36 GB" in bars[-1]) == (columns == 200)
    assert "time: about 1 h 39 min left" in printed


DURATIONS = {
    0.2: "1 s",
    40: "40 s",
    59.7: "1 min",
    61: "1 min",
    1500: "25 min",
    3599: "1 h",
    12000: "3 h 20 min",
    7200: "2 h",
}
DURATIONS |= {47 * 3600: "47 h", 49 * 3600: "2 days 1 h", 72 * 3600: "3 days"}


@pytest.mark.parametrize(("seconds", "text"), DURATIONS.items())
def test_duration(seconds, text):
    assert duration(seconds) == f"about {text}"
