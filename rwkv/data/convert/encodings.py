"""Guess the encoding of text that is not UTF-8, and suggest how to convert it."""

import codecs
import re
import shlex
from collections.abc import Sequence

from rwkv.data.convert.source_file import TEXT, Source, open_source
from rwkv.errors import UserError

_CYRILLIC = ("cp1251", "koi8-r", "cp866", "iso8859-5")
_CANDIDATES = ("gb18030", "big5", "shift_jis", "euc_jp", "euc_kr", "cp1252", *_CYRILLIC)
_FREQUENT = frozenset("оеаинтсрвл")  # two thirds of the letters of Russian
_BLOCK = 1 << 16  # bytes examined per file
_MAX_FILES = 2000  # files examined to count those that are not UTF-8
_NAMES = {
    "gb18030": "GBK",
    "big5": "Big5",
    "shift_jis": "Shift-JIS",
    "euc_jp": "EUC-JP",
    "euc_kr": "EUC-KR",
    "utf-16": "UTF-16",
    "utf-32": "UTF-32",
    "koi8-r": "KOI8-R",
    "cp866": "CP866",
    "iso8859-5": "ISO 8859-5",
    "cp1251": "Windows-1251",
    "cp1252": "Windows-1252",
}


def check(encoding: str) -> None:
    """Raise UserError if there is no such text encoding."""
    if not encoding:
        return
    try:
        info = codecs.lookup(encoding)
        if not info._is_text_encoding:
            raise LookupError
        codecs.getincrementaldecoder(encoding)("rwkv.mark").decode("a".encode(encoding))
    except (LookupError, ValueError, UnicodeError, TypeError) as error:
        raise UserError(
            f"--encoding {encoding}: no such text encoding; for example gb18030 (also for GBK), big5, shift_jis, utf-16, cp1252"
        ) from error


def same_as_utf8(encoding: str) -> bool:
    """Whether an encoding name means UTF-8."""
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def is_utf8_text(source: Source, encoding: str) -> bool:
    """Whether a file is UTF-8 and should be read as such despite --encoding: a folder may contain
    both.
    """
    if same_as_utf8(encoding):
        return True
    head = sample(source)
    if not valid_utf8(head):
        return False
    # ASCII decodes the same in both, unless the encoding uses several bytes for each character
    if head.isascii():
        return b"\0" not in head and len("a".encode(encoding)) > 1
    text = head.decode("utf-8", "ignore")
    return any(letter > "\u07ff" for letter in text) or sum(letter > "\x7f" for letter in text) >= 10


def sample(source: Source) -> bytes:
    """The first block of a file that contains non-ASCII bytes, or its last block; empty if the file
    is corrupt.
    """
    try:
        with open_source(source) as (file, _):
            head = file.read(_BLOCK)
            while head.isascii() and (more := file.read(_BLOCK)):
                head = more
            return head
    except (UserError, OSError):
        return b""


def valid_utf8(data: bytes) -> bool:
    """Whether bytes are UTF-8; the last character may be incomplete."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return True


def guess(data: bytes) -> str:
    """The likely encoding of bytes, by its Python name; "" if unknown, or if they are UTF-8 with
    errors.
    """
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # the former begins as UTF-16's
        return "utf-32"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in data:
        return utf_16_without_mark(data, 0.2)
    if len(data.decode("utf-8", "ignore").encode()) > 0.8 * len(data) and not data.isascii():
        multi = sum(byte >= 0x80 for byte in data)
        kept = sum(byte >= 0x80 for byte in data.decode("utf-8", "ignore").encode())
        if kept > 0.5 * multi:
            return ""  # UTF-8 with some errors
    scores = {name: _score(data, name) for name in _CANDIDATES}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] > 0.5 else ""


def utf_16_without_mark(data: bytes, minimum: float) -> str:
    """utf-16-le or utf-16-be if bytes look like UTF-16 without a byte order mark; else "".

    Args:
        minimum: minimum share of characters below U+0100, whose high byte is 0 (such text is valid
            UTF-8 too).
    """
    even, odd = data[::2].count(0), data[1::2].count(0)
    if max(even, odd) > minimum * len(data) / 2 and min(even, odd) < 0.1 * max(even, odd):
        return "utf-16-le" if odd > even else "utf-16-be"
    return ""


def _score(data: bytes, encoding: str) -> float:
    """How typical the non-ASCII characters are for texts in this encoding, 0 to about 1; -1 if the
    bytes are not valid in it.
    """
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return -1
    letters = [letter for letter in text if letter > "\x7f"]
    if not letters or (encoding == "euc_kr" and len(letters) < 8):
        return 0
    words = sum(map(len, re.findall(r"[^\x00-\x7f]{2,}", text))) > 0.7 * len(letters) and len(letters) >= 8
    if encoding in _CYRILLIC:
        return 1.3 if words and sum(letter in _FREQUENT for letter in letters) > 0.45 * len(letters) else 0
    if encoding == "cp1252" and words:
        return 0  # another alphabet: accented letters are rarely side by side
    return sum(_plausibility(letter, encoding) for letter in letters) / len(letters)


def _plausibility(letter: str, encoding: str) -> float:
    if encoding == "cp1252":  # letters of European languages
        return 0.6 if (letter.isalpha() and letter < "\u0180") or letter in "‘’“”–—…«»°€£" else 0
    try:
        lead = letter.encode(encoding)[0]
    except UnicodeEncodeError:
        return 0
    if "\u3000" <= letter <= "\u303f" or "\uff00" <= letter <= "\uff60" or letter in "“”‘’—…·":
        return 0.7  # punctuation
    if "\u3040" <= letter <= "\u30ff":
        return 1.2 if encoding in ("shift_jis", "euc_jp") else 0.1
    if "\uac00" <= letter <= "\ud7a3":
        # the same bytes are common Chinese characters in GBK, but Chinese texts contain others too
        return 1.05 if encoding == "euc_kr" else 0
    if "\u4e00" <= letter <= "\u9fff":
        common = {
            "gb18030": 0xB0 <= lead <= 0xD7,
            "big5": 0xA4 <= lead <= 0xC6,
            "shift_jis": 0x88 <= lead <= 0x97,
            "euc_jp": 0xB0 <= lead <= 0xCF,
        }
        if encoding == "gb18030":
            return 1 if common["gb18030"] and len(raw := letter.encode("gb18030")) == 2 and raw[1] >= 0xA1 else 0.1
        return 0.9 if common.get(encoding, False) else 0.1
    return 0


def advice(failed: Source, sources: Sequence[Source]) -> str:
    """Advice to append to the error about a file that is not UTF-8: its likely encoding, the fix,
    and how many files it concerns.
    """
    found = guess(sample(failed))
    name = _NAMES.get(found.removesuffix("-le").removesuffix("-be"), found)
    text = [source for source in sources if source.kind in TEXT][:_MAX_FILES]
    wrong = [source for source in text if not valid_utf8(sample(source))]
    count = ""
    if len(text) > 1 and wrong:
        names = ", ".join(source.path.name for source in wrong[:3]) + (", …" if len(wrong) > 3 else "")
        count = f" ({len(wrong):,} of {len(text):,} files are not UTF-8: {names})"
    if not found:
        return f"; save the file as UTF-8, or pass its encoding as --encoding NAME{count}"
    charset = re.sub("-([LB]E)$", r"\1", found.upper().replace("_", "-"))  # as iconv spells it
    command = f"iconv -f {charset} -t UTF-8 {shlex.quote(str(failed.path))} > new{failed.path.suffix}"
    return f"; it looks like {name}. Pass --encoding {found}, or save it as UTF-8: {command}{count}"
