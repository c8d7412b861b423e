"""Natural sort order of file names: 2 before 10, 第二章 before 第十章."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_DIGITS = {**{letter: i for i, letter in enumerate("零一二三四五六七八九")}, "〇": 0, "两": 2, "兩": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10000, "萬": 10000}
_NUMERAL = "[" + "".join([*_DIGITS, *_UNITS]) + "]+"
_AFTER = "章回节節卷集部篇话話册冊折幕"
_NUMBER = re.compile(rf"(\d+|(?<=[第卷]){_NUMERAL}|{_NUMERAL}(?=[{_AFTER}]))")


def natural(paths: Iterable[Path]) -> list[Path]:
    """Sort paths folder by folder, numbers in names by value, ignoring case."""
    return sorted(paths, key=lambda path: ([_key(part) for part in path.parts], str(path)))


def format_names(paths: Sequence[Path]) -> str:
    """The file names, comma-separated; the middle of a long list is elided."""
    names = [path.name for path in paths]
    shown = names if len(names) <= 6 else [*names[:4], "…", names[-1]]
    return f"{', '.join(shown)}" + (f" ({len(names):,} files)" if len(names) > 6 else "")


def _key(name: str) -> list[tuple[str, int]]:
    """Sort key of a name: alternating text and numbers."""
    parts = [*_NUMBER.split(name.casefold()), ""]
    return [(text, _value(number)) for text, number in zip(parts[::2], parts[1::2], strict=True)]


def _value(number: str) -> int:
    if not number:
        return -1
    if number[0].isdecimal():
        return int(number[-4000:])  # Python rejects longer ones
    if not any(letter in _UNITS for letter in number):  # 一二三 as 123
        return int("".join(str(_DIGITS[letter]) for letter in number)[-4000:])
    total = section = digit = 0
    for letter in number:
        if letter in _DIGITS:
            digit = _DIGITS[letter]
            continue
        unit = _UNITS[letter]
        if unit == 10000:
            total, section, digit = (total + section + digit) * unit, 0, 0
        else:
            section, digit = section + (digit or 1) * unit, 0
    return total + section + digit
