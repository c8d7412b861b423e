"""loss.png for runs of every length: legend and axes."""

import math
import random
import subprocess
import sys
import warnings

import pytest

from rwkv import plots
from rwkv.train.callbacks.curve import Curve
from rwkv.train.callbacks.plot import plot
from tests.waiting import LIMIT


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw a run of `count` steps; returns its two axes and the legend's texts."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, image: (figures.append(figure), figure.savefig(image, dpi=50))[0])

    def draw(count, loss, validation=None, title="run: LoRA"):
        curve = Curve()
        for step in range(1, count + 1):
            line = {"step": step, "loss": loss(step), "lr": 6e-4 / step}
            if validation and step % validation == 0:
                line["val_loss"] = loss(step) + abs(step - count / 2) / count
            curve.add(line, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plot(curve, tmp_path / "loss.png", title)
        legend = [text.get_text() for text in figures[-1].legends[0].get_texts()] if figures[-1].legends else []
        return figures[-1].axes, legend

    return draw


@pytest.mark.parametrize("count", [0, 1, 2, 4, 19, 20, 45, 1000, 10000])
def test_ticks_and_legend(drawn, count):
    (left, right), legend = drawn(count, lambda step: 3 / (1 + step))
    figure = left.figure
    figure.canvas.draw()
    for tick in left.get_xticks():
        assert tick == round(tick)
    assert not any("mean of 1 " in text for text in legend)
    assert any(text.startswith("mean of") for text in legend) == (count >= 40)
    assert right.get_ylim()[0] == 0
    assert all(len(tick.get_text()) < 9 for tick in right.get_yticklabels())
    assert right.yaxis.get_offset_text().get_text() == ""


def test_large_initial_loss_clipped(drawn):
    draw = random.Random(1)
    (left, _), _ = drawn(500, lambda step: 1.3 + 8 * math.exp(-step / 5) + draw.gauss(0, 0.02))
    assert left.get_ylim()[1] < 2
    assert "up to 7.8" in left.texts[0].get_text()
    (left, _), _ = drawn(500, lambda step: 5 - step / 200)
    assert left.get_ylim()[1] > 4.9
    assert not left.texts


def test_single_large_losses_clipped(drawn):
    draw = random.Random(1)
    (left, _), _ = drawn(1000, lambda step: 80 if step == 501 else 3 + draw.gauss(0, 0.02))
    assert left.get_ylim()[1] < 4
    assert left.texts[0].get_text() == "↑ near step 501: up to 80"


def test_best_value_marked(drawn):
    (left, _), legend = drawn(400, lambda step: 3 - step / 1000, validation=50)
    best = next(text for text in legend if text.startswith("best validation loss"))
    assert best.endswith("step 200")
    star = next(line for line in left.lines if line.get_marker() == "*")
    assert list(star.get_xdata()) == [200]
    _, legend = drawn(10, lambda step: 3 + (step - 7) ** 2)
    assert "lowest loss: 3.000, step 7" in legend


@pytest.mark.parametrize("title", ["小说/输出: LoRA, 60 steps", "a$b_c^d: \\alpha", "\t\n"])
def test_any_title(drawn, title):
    (left, _), _ = drawn(3, float, title=title)
    assert "\n" not in left.get_title()


def test_no_warning_with_flushed_denormals(root, tmp_path):
    """With flushed denormals, as in training, numpy warns once per process on the first use of
    finfo.
    """
    program = """
import warnings
warnings.simplefilter("error")
import sys
from pathlib import Path
import torch
from rwkv.train.callbacks.curve import Curve
from rwkv.train.callbacks.plot import plot
torch.set_flush_denormal(True)
curve = Curve()
curve.add({"step": 1, "loss": 2.0, "lr": 1e-4}, 0)
plot(curve, Path(sys.argv[1]), "x")
"""
    command = [sys.executable, "-c", program, str(tmp_path / "x.png")]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (result.returncode, result.stderr) == (0, "")
