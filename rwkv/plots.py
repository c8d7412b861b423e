"""What the pictures share: a size, titles in any script, numbers with thousands separators, and files that appear atomically."""

import functools
import re
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv.files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Fonts whose names match are looked at first: they have the scripts that matplotlib's own font lacks.
_LIKELY = re.compile(
    r"CJK|Han|Hei|Ming|Song|Kai|Fang|Gothic|Mincho|WenQuanYi|YaHei|PingFang|Hiragino|Fallback|Nanum|Malgun|Unicode|Unifont|Noto",
    re.I,
)


def new(width: float = 8, height: float = 4.5) -> "tuple[Figure, Axes]":
    """A figure of this size in inches, and its axes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*smallest subnormal.*")
        import numpy.ma
        from matplotlib.figure import Figure  # 25 MB: only where there is a picture

        for kind in (
            numpy.float32,
            numpy.float64,
        ):  # numpy asks once what the smallest numbers are, and training flushes them to 0
            numpy.finfo(kind)

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save(figure: "Figure", image: Path) -> None:
    """Write the figure as a PNG.

    Raises:
        UserError: the disk is full, or read-only.
    """
    with whole(image) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def set_title(axes: "Axes", text: str) -> None:
    """A title in whatever script it is: in a font that has its characters; what no installed font has is omitted, without warnings or boxes."""
    text = "".join(
        " " if unicodedata.category(x).startswith(("C", "Z")) else x for x in unicodedata.normalize("NFC", text)
    )
    families, covered = _fonts(frozenset(text))
    shown = re.sub(r"\s+", " ", re.sub("\0+", "…", "".join(x if x in covered else "\0" for x in text))).strip()
    axes.set_title(shown, fontfamily=families, parse_math=False)


def counted(value: float, _: Any = None) -> str:
    """A count as a label of an axis."""
    return f"{value:,.0f}" if value == round(value) else ""


@functools.lru_cache(maxsize=16)
def _fonts(characters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Families that together have as many of the characters as installed fonts have, and which these are."""
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
    """The characters that the font in this file can draw."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):  # coloured emoji, a format that FreeType was not built with
        return frozenset()
