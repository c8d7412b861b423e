"""Titles in any script are drawn without warnings or missing glyphs."""

import os
import struct
import subprocess
import sys
import warnings

import pytest

from rwkv import plots


def drawn(tmp_path, text):
    """The title's text after drawing."""
    figure, axes = plots.new()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.set_title(axes, text)
        plots.save(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    return axes.get_title(), axes.title.get_fontfamily()


def test_unknown_backend_in_the_environment(root):
    program = "import os; from rwkv import plots; plots.new(); assert os.environ['MPLBACKEND'] == 'unknown'"
    subprocess.run([sys.executable, "-c", program], cwd=root, env={**os.environ, "MPLBACKEND": "unknown"}, check=True)


@pytest.mark.parametrize(
    "text",
    [
        "我的小说/输出: LoRA",
        "小説",
        "소설",
        "ελληνικά $x^2$ \\frac",
        "a\nb\tc",
        "😀 run",
        "\ue000\U000f0000",
        "",
        "नमस्ते",
    ],
)
def test_title_in_any_script(tmp_path, text):
    shown, families = drawn(tmp_path, text)
    assert "\n" not in shown
    covered = plots._fonts(frozenset(shown))[1]
    assert set(shown) <= covered
    assert families[0] == "DejaVu Sans"


def test_supported_characters_kept(tmp_path):
    assert drawn(tmp_path, r"out\run $1 {x} é ж: LoRA, 60 steps")[0] == r"out\run $1 {x} é ж: LoRA, 60 steps"


def test_fallback_font_used(tmp_path, monkeypatch):
    """The default font lacks a character that another DejaVu font has (simulated, as installed
    fonts differ).
    """
    has, lacking = plots._has, frozenset("ж")
    monkeypatch.setattr(
        plots, "_has", lambda path: has(path) - lacking if path.endswith("/DejaVuSans.ttf") else has(path)
    )
    plots._fonts.cache_clear()
    shown, families = drawn(tmp_path, "ж 1")
    plots._fonts.cache_clear()
    assert shown == "ж 1"
    assert len(families) == 2
    assert families[1] != "DejaVu Sans"


def test_figure_size(tmp_path):
    drawn(tmp_path, "x")
    assert struct.unpack(">II", (tmp_path / "x.png").read_bytes()[16:24]) == (960, 540)
