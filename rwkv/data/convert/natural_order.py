"""Natural sort order of file names: 2 before 10, 第二章 before 第十章."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

_DIGITS = {
    letter: i
    for digits in ("零一二三四五六七八九", "〇壹贰叁肆伍陆柒捌玖", "〇壹貳參肆伍陸柒捌玖")
    for i, letter in enumerate(digits)
}
_DIGITS |= {"两": 2, "兩": 2}
_UNITS = {"十": 10, "百": 100, "千": 1000, "万": 10000, "萬": 10000, "拾": 10, "佰": 100, "仟": 1000}
_TENS = {"廿": 20, "卅": 30}
_NUMERAL = "[" + "".join([*_DIGITS, *_UNITS, *_TENS]) + "]+"
_AFTER = "章回节節卷集部篇话話册冊折幕"
_END = r"(?![^\W_])"  # no letter or digit follows
# 上中下, 前中后: parts of a work
_PART = rf"[上中下前后後](?=[册冊卷部篇集编編]|{_END})"
_NUMBER = re.compile(rf"(\d+|(?<=[第卷]){_NUMERAL}|{_NUMERAL}(?=[{_AFTER}])|{_NUMERAL}{_END}|{_PART})")
_PARTS = {"上": 1, "前": 1, "中": 2, "下": 3, "后": 3, "後": 3}
_ROMAN = re.compile(r"(?<![^\W_])(?=[ivxl])(xl|l?x{0,3})(ix|iv|v?i{0,3})" + _END)
_ROMAN_VALUES = {"i": 1, "v": 5, "x": 10, "l": 50}
_FRONT = re.compile(rf"(?:序章?|序言|自序|前言|引言|引子|楔子|prologue|preface|foreword){_END}")
_BACK = re.compile(rf"(?:尾声|尾聲|后记|後記|跋|番外|终章|終章|epilogue|afterword|appendix)(?:{_END}|\d|篇)")
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
).split()
_TENS_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SPELLED = re.compile(
    rf"\b(chapter|part|book|volume|act|scene|section|lesson|episode|day)([\W_]*)(?:({'|'.join(_TENS_WORDS)})[\W_]?)?({'|'.join(_WORDS[::-1])})?{_END}"
)


def natural(paths: Iterable[Path]) -> list[Path]:
    """Sort paths folder by folder, numbers in names by value, ignoring case and the kind of
    separators; prologues are first and epilogues last.

    Roman numerals are numbers if one of the names has II: Part C and Part D are not numbered.
    """
    paths = list(paths)
    roman = any(re.search(rf"(?<![^\W_])ii{_END}", _folded(part)) for path in paths for part in path.parts)
    return sorted(
        paths, key=lambda path: ([_key(part, roman) for part in (*path.parts[:-1], path.stem, path.suffix)], str(path))
    )


def format_names(paths: Sequence[Path]) -> str:
    """The file names, comma-separated; the middle of a long list is elided."""
    names = [path.name for path in paths]
    shown = names if len(names) <= 6 else [*names[:4], "…", names[-1]]
    return f"{', '.join(shown)}" + (f" ({len(names):,} files)" if len(names) > 6 else "")


def _folded(name: str) -> str:
    return re.sub(r"[\s_–—-]+", " ", unicodedata.normalize("NFKC", name).casefold())


def _key(name: str, roman: bool) -> list[tuple[str, int]]:
    """Sort key of a name: alternating text and numbers."""
    name = _SPELLED.sub(_spelled, _folded(name))
    if roman:
        name = _ROMAN.sub(lambda match: str(_roman(match[0])), name)
    parts = [*_NUMBER.split(name), ""]
    place = -1 if _FRONT.match(name) else 1 if _BACK.match(name) else 0
    return [("", place), *((text, _value(number)) for text, number in zip(parts[::2], parts[1::2], strict=True))]


def _spelled(match: re.Match) -> str:
    """chapter 21 for chapter twenty-one."""
    word, between, tens, ones = match.groups()
    if not (tens or ones):
        return match[0]
    return f"{word}{between}{(20 + 10 * _TENS_WORDS.index(tens) if tens else 0) + (_WORDS.index(ones) if ones else 0)}"


def _roman(numeral: str) -> int:
    values = [_ROMAN_VALUES[letter] for letter in numeral]
    return sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))


def _value(number: str) -> int:
    if not number:
        return -1
    if number in _PARTS:
        return _PARTS[number]
    if number[0].isdecimal():
        return int(number[-4000:])  # Python rejects longer ones
    if not any(letter in _UNITS or letter in _TENS for letter in number):  # 一二三 as 123
        return int("".join(str(_DIGITS[letter]) for letter in number)[-4000:])
    total = section = digit = 0
    for letter in number:
        if letter in _DIGITS:
            digit = _DIGITS[letter]
        elif letter in _TENS:
            section, digit = section + _TENS[letter], 0
        elif (unit := _UNITS[letter]) == 10000:
            total, section, digit = (total + section + digit) * unit, 0, 0
        else:
            section, digit = section + (digit or 1) * unit, 0
    return total + section + digit
