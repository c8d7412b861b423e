"""Records in batches of about source_file.CHUNK characters, with limits on their size and
nesting.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rwkv.data.convert import source_file
from rwkv.data.convert.jsonl import BadRecord
from rwkv.data.convert.source_file import Source
from rwkv.errors import UserError

MAX_DEPTH = 100  # levels of nesting in a record


class Row(dict):
    """A record of which only some fields were read.

    Attributes:
        omitted: names of the others.
    """

    omitted: Sequence[str] = ()

    def __init__(self, fields: Mapping[str, Any], omitted: Sequence[str] = ()):
        super().__init__(fields)
        self.omitted = omitted

    def __reduce__(self):
        return Row, (dict(self), self.omitted)


def select_columns(source: Source, names: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Those of the fields that are columns. Raises UserError if none is."""
    if columns := [name for name in fields if name in names]:
        return columns
    has = ", ".join(map(repr, names[:8])) or "nothing"
    raise UserError(f'{source.path}: no column "{fields[0]}" (it has {has}); name another with --jsonl-keys')


def keep_fields(record: Any, fields: Sequence[str]) -> Any:
    """The given fields of a record; if it has none of them, all its keys with None, for the error
    message.
    """
    if isinstance(record, dict) and (kept := {key: record[key] for key in fields if key in record}):
        return Row(kept, [key for key in record if key not in kept and record[key] not in (None, "")])
    return dict.fromkeys(record) if isinstance(record, dict) else record


def batches(source: Source, rows: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Group rows into lists of about CHUNK characters. BadRecords pass through; too large or deep
    rows become BadRecords.
    """
    batch, size = [], 0
    for number, row in rows:
        length = nested_length(row, MAX_DEPTH)
        if length is None:
            row, length = BadRecord(f"nested too deeply (more than {MAX_DEPTH} levels)"), 0
        if length > source.max_record:
            row, length = source.too_large, 0
        batch.append((number, row))
        size += length
        if size >= source_file.CHUNK or len(batch) == 1 << 14:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def nested_length(value: Any, max_depth: int) -> int | None:
    """Characters in a record; None if it is nested deeper than `max_depth` levels. Iterative, so
    that depth is unlimited.
    """
    total, level, depth = 0, [value], 0
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, str | bytes):
                total += len(item)
            elif isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        level, depth = below, depth + 1
        if depth > max_depth + 1:
            return None
    return total
