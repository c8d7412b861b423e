"""Parse a line of jsonl, a JSON object with the text under a key, and explain what is wrong with
it.
"""

import json
import math
import re
from typing import Any

import orjson


class BadRecord(ValueError):
    """A record that cannot be converted. The message is the reason; callers add its file and
    number.
    """


def _integer(digits: str) -> float:
    return int(digits) if len(digits) < 4000 else math.inf  # Python rejects longer ones


DECODER = json.JSONDecoder(parse_int=_integer)


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these members, for object_pairs_hook. Raises BadRecord if a key occurs
    twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise BadRecord(f"the key {check_encodable(twice)[:40]!r} occurs twice in one object; remove one of them")
    return found


_UNIQUE = json.JSONDecoder(parse_int=_integer, object_pairs_hook=reject_duplicate_keys)


def parse(line: bytes) -> Any:
    """The JSON value on a line. Raises BadRecord if it is not UTF-8 or not JSON."""
    try:
        value = orjson.loads(line)
        if _colons(line) <= _keys(value):
            return value
    except orjson.JSONDecodeError:
        # the standard library accepts more (NaN, numbers of any size) and reports errors better
        pass
    text = decode_utf8(line)
    try:
        return _UNIQUE.decode(text)
    except BadRecord:
        raise
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON: {_reason(text, error)}") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(
            "not JSON: nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
        ) from error


_ONE_A_LINE = "a .jsonl file has one object per line"


def _reason(text: str, error: json.JSONDecodeError) -> str:
    """What is wrong with a line, and how to fix it."""
    stripped, at, msg = text.strip(), error.pos, error.msg
    before = text[:at].rstrip()[-1:]
    if not stripped.strip("\0"):
        return f"{len(stripped):,} NUL bytes, as left by a crash or a full disk; remove the line"
    if stripped.lower().startswith(("<!doctype", "<html")):
        return "a web page, not JSON; download the file itself"
    if stripped.startswith("\ufeff"):
        return "a byte order mark (U+FEFF) at the start of the line, as left by joining files; remove it"
    if "\r" in stripped and "\n" not in stripped and msg in ("Extra data", "Expecting value"):
        return r"the lines end with a carriage return alone; convert it: tr '\r' '\n' < old > new"
    if msg == "Extra data" and text[at:].strip() == ",":
        return f"there is a comma after the closing {before}; {_ONE_A_LINE} and no commas between lines"
    if msg == "Extra data":
        return f"there is more after the first value, at column {at + 1}: {text[at : at + 20]!r}; {_ONE_A_LINE}"
    if stripped in ("[", "]", "],", "[{", "}]"):
        return (
            f"part of a JSON array over several lines; {_ONE_A_LINE}: name the file .json, or pass --input_format json"
        )
    if stripped.startswith("[") and at >= len(text.rstrip()):
        return f"the beginning of a JSON array; {_ONE_A_LINE}: name the file .json, or pass --input_format json"
    if stripped in ("{", "}", "},") or (at >= len(text.rstrip()) and not msg.startswith("Unterminated")):
        return f"the value does not end on this line; {_ONE_A_LINE}: write each on one line, such as with `jq -c . old > new`, or make a .json array"
    if found := likely_cause(text, at, msg):
        return f"{found}, at column {at + 1}"
    if msg.startswith("Unterminated string"):
        return f"the string that begins at column {at + 1} does not end on this line; truncated, or a line break inside it, which must be written \\n"
    return f"{msg[0].lower()}{msg[1:]} at column {at + 1}"


def likely_cause(text: str, at: int, msg: str) -> str:
    """The likely cause of the json module's error `msg` at a position; "" if unknown."""
    after, before = text[at : at + 1], text[:at].rstrip()[-1:]
    if after == "'" or (before == "'" and "'" in text):
        return 'single quotes; JSON needs "double quotes"'
    if msg.startswith("Invalid control character"):
        return r"a tab or another control character inside a string; write \t, or \u and its code"
    if (after and after in "}]" and before == ",") or msg.startswith("Illegal trailing comma"):
        return f"a comma before the closing {text[at:].lstrip(',').lstrip()[:1]}; remove it"
    if text[at : at + 2] in ("//", "/*") or after == "#":
        return "a comment; JSON has none"
    if word := re.match(r"(None|True|False|undefined)\b", text[at:]):
        return f"{word[1]}; JSON writes null, true, false"
    if re.match(r"[^\W\d]\w*\s*:", text[at:]) and msg.startswith("Expecting property name"):
        return 'a name without quotes; JSON needs "double quotes" around names'
    if msg.startswith("Expecting ',' delimiter"):
        return f'unexpected text after a value: {text[at : at + 20]!r}; a " inside a string must be written \\"'
    return ""


_MAGIC = (
    (b"\x1f\x8b", "compressed by gzip; let the name end in .gz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; let the name end in .zst"),
)


def duplicate_key(text: str, value: Any) -> BadRecord | None:
    """The error if a key occurs twice in an object of a JSON text that was decoded to `value`; else
    None.
    """
    if _colons(text.encode("utf-8", "surrogatepass")) <= _keys(value):
        return None
    try:
        _UNIQUE.decode(text)
    except BadRecord as error:
        return error
    return None


def _colons(line: bytes) -> int:
    """Upper bound of the number of keys, usually exact: quotes before colons, except inside
    strings.
    """
    return line.count(b'":') - line.count(b'\\":') + line.count(b'" :') - line.count(b'\\" :')


def _keys(value: Any) -> int:
    """Number of keys of all objects in a JSON value."""
    count, waiting = 0, [value] if isinstance(value, dict | list) else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            count += len(value)
            value = value.values()
        waiting += [item for item in value if isinstance(item, dict | list)]
    return count


def decode_utf8(line: bytes) -> str:
    """The text of a line's bytes. Raises BadRecord if they are not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        magic = next((what for begin, what in _MAGIC if line.startswith(begin)), "")
        raise BadRecord(
            magic or f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})"
        ) from error


def text_of(key: str, record: Any) -> str:
    """The text of a record. Raises BadRecord if it is not an object, lacks the key, or has no text
    under it.
    """
    if not isinstance(record, dict) or key not in record:
        has = (
            f"it has {', '.join(map(repr, list(record)[:5])) or 'nothing'}"
            if isinstance(record, dict)
            else f"it is of type {type(record).__name__}"
        )
        raise BadRecord(
            f'no "{key}" ({has}); expected {{"{key}": "..."}}, messages, or a pair such as instruction and output; or name another key with --jsonl-keys'
        )
    text = record[key]
    if isinstance(text, list) and all(isinstance(x, str) for x in text):
        text = "\n\n".join(text)
    if not isinstance(text, str):
        raise BadRecord(f'"{key}" is of type {type(text).__name__}, not a string')
    return check_encodable(text)


def check_encodable(text: str) -> str:
    """The text itself. Raises BadRecord if it contains a lone surrogate."""
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"a lone surrogate ({text[error.start]!r}, half of a surrogate pair) in the text; remove it"
        ) from error
    return text
