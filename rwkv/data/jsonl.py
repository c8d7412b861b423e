"""A line of jsonl: one JSON object, the text under one key."""

import json
from typing import Any

import orjson


class BadRecord(ValueError):
    """What is wrong with one record; who knows its file and number adds them."""


def parse(line: bytes) -> Any:
    """The JSON value on a line. Raises BadRecord if it is not UTF-8 or not JSON."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass  # the standard library takes more, such as NaN and numbers of any size, and says better what is wrong
    text = utf8(line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON ({error})") from error


def utf8(line: bytes) -> str:
    """The text of a line's bytes. Raises BadRecord if they are not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x}); save the file as UTF-8") from error


def text_under(key: str, record: Any) -> str:
    """The text of a record. Raises BadRecord if it is no object, has no such key, or no text under it."""
    if not isinstance(record, dict) or key not in record:
        has = (
            f"it has {', '.join(map(repr, list(record)[:5])) or 'nothing'}"
            if isinstance(record, dict)
            else f"it is a {type(record).__name__}"
        )
        raise BadRecord(f'no "{key}" ({has}); expected {{"{key}": "..."}}, or name another key with --jsonl-keys')
    text = record[key]
    if isinstance(text, list) and all(isinstance(x, str) for x in text):
        text = "\n\n".join(text)
    if not isinstance(text, str):
        raise BadRecord(f'"{key}" is a {type(text).__name__}, not a string')
    return encodable(text)


def encodable(text: str) -> str:
    """The text itself. Raises BadRecord if it holds half of a surrogate pair."""
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"half of a surrogate pair ({text[error.start]!r}) in the text; it stands for no character") from error
    return text
