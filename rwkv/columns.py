"""Align the columns of a table in a terminal."""

import unicodedata
from collections.abc import Collection, Sequence


def columns(rows: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Align rows; the columns whose numbers are in `left` to the left, the others to the right."""
    widths = [max(_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell + " " * (width - _width(cell)) if i in left else " " * (width - _width(cell)) + cell
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _width(text: str) -> int:
    """Columns of a text in a terminal: two for wide characters."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
