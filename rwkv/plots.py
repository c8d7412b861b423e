"""Helpers for plots: figure size, titles in any script, number labels, atomic PNG files."""

import functools
import os
import re
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Fonts with these names are tried first: they cover scripts that matplotlib's default font lacks.
_LIKELY = re.compile(
    r"CJK|Han|Hei|Ming|Song|Kai|Fang|Gothic|Mincho|WenQuanYi|YaHei|PingFang|Hiragino|Fallback|Nanum|Malgun|Unicode|Unifont|Noto",
    re.I,
)


def new(width: float = 8, height: float = 4.5) -> "tuple[Figure, Axes]":
    """Create a figure of this size in inches, and its axes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*smallest subnormal.*")
        import numpy.ma

        # the backend of another environment may be unknown here, and none is used
        backend = os.environ.pop("MPLBACKEND", None)
        try:
            from matplotlib.figure import Figure  # takes 25 MB, so imported on use
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend

        # numpy warns if denormals are flushed to 0, as in training. It caches the result of finfo,
        # so compute it here with the warning silenced.
        for kind in (numpy.float32, numpy.float64):
            numpy.finfo(kind)

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save(figure: "Figure", image: Path) -> None:
    """Write the figure as a PNG.

    Raises:
        UserError: the disk is full, or read-only.
    """
    with atomic_write(image) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def set_title(axes: "Axes", text: str) -> None:
    """Set a title, using fonts that have its characters; characters that no installed font has
    become "…".
    """
    text = "".join(
        " " if unicodedata.category(x).startswith(("C", "Z")) else x for x in unicodedata.normalize("NFC", text)
    )
    families, covered = _fonts(frozenset(text))
    shown = re.sub(r"\s+", " ", re.sub("\0+", "…", "".join(x if x in covered else "\0" for x in text))).strip()
    axes.set_title(shown, fontfamily=families, parse_math=False)


def format_count(value: float, _: Any = None) -> str:
    """Format a count as an axis label."""
    return f"{value:,.0f}" if value == round(value) else ""


@functools.lru_cache(maxsize=16)
def _fonts(characters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Font families that together cover as many of the characters as possible, and the characters
    covered.
    """
    from matplotlib import font_manager

    own = font_manager.FontProperties(family="DejaVu Sans")
    families, covered = ["DejaVu Sans"], characters & _has(font_manager.findfont(own))
    fonts = sorted(
        font_manager.fontManager.ttflist,
        key=lambda font: (not _LIKELY.search(font.name), font.weight != 400, font.name),
    )
    for font in fonts if characters - covered else []:
        if font.name not in families and (found := (characters - covered) & _has(font.fname)):
            families.append(font.name)
            covered |= found
            if covered == characters:
                break
    return families, covered


@functools.lru_cache(maxsize=512)
def _has(path: str) -> frozenset[str]:
    """The characters in a font file."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        # for example colour fonts, if FreeType was built without support for them
        return frozenset()
