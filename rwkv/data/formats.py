"""How each format is read: a file to batches of records, or of lines, in order and in bounded memory. Damage is told by file and place."""

import csv
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rwkv.data.jsonl import BadRecord
from rwkv.errors import UserError

CHUNK = 1 << 20  # bytes of text that a worker takes at a time
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """A file to convert. kind: jsonl, json, lines (of text), txt (one document), csv, parquet, arrow. compression: gzip, zstd or none."""

    path: Path
    kind: str
    compression: str
    size: int
    mtime_ns: int = 0


class opened:
    """(the decompressed bytes of a source, how many bytes of the file have been read so far), with damage as a UserError."""

    def __init__(self, source: Source):
        self._source = source

    def __enter__(self) -> tuple[BinaryIO, Callable[[], int]]:
        self._raw = open(self._source.path, "rb")
        if not self._source.compression:
            return self._raw, self._raw.tell
        import pyarrow  # a fifth of a second, and plain jsonl needs none of it

        # not Python's gzip or zstandard: the second takes a file that is cut short for a whole one
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._raw, "r"), self._source.compression)
        return io.BufferedReader(stream, 1 << 18), self._raw.tell

    def __exit__(self, kind, error, _):
        self._raw.close()
        if isinstance(error, OSError) and not error.errno:  # pyarrow's
            raise UserError(f"{self._source.path}: damaged or cut short ({error})") from error


def _lines(source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]) -> Iterator[tuple[dict, None]]:
    first = True
    while data := file.read(CHUNK):
        data += file.readline()
        yield {"lines": data.removeprefix(BOM) if first else data}, None
        first = False


def _array(source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]) -> Iterator[tuple[dict, None]]:
    """A JSON array, element by element. The buffer holds a block or the longest element, whichever is longer.

    By the standard library: ijson puts `?` for half of a surrogate pair and stops at NaN and at long numbers.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    decode, buffer, at, number, ended = json.JSONDecoder().raw_decode, "", 0, 0, False

    def expect(characters: str) -> str:
        """The next character that is no space, which must be one of these."""
        nonlocal buffer, at
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n":
                at += 1
            if at < len(buffer):
                break
            buffer, at = text.read(CHUNK), 0
            if not buffer:
                raise UserError(f"{source.path}: cut short after element {number}; the array does not end")
        if characters and buffer[at] not in characters:
            raise UserError(f"{source.path}: after element {number} there is {buffer[at]!r}, expected {' or '.join(characters)}")
        return buffer[at]

    def rows() -> Iterator[tuple[int, Any]]:
        nonlocal buffer, at, number, ended
        expect("[")
        at += 1
        if ended := expect("") == "]":
            at += 1
        while not ended:
            expect("")
            try:
                element, at = decode(buffer, at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 64
                more = text.read(max(CHUNK, len(buffer) - at)) if cut else ""
                if not more:
                    raise UserError(f"{source.path}, element {number + 1}: not JSON ({error.msg})") from error
                buffer, at = buffer[at:] + more, 0
                continue
            except RecursionError as error:
                raise UserError(f"{source.path}, element {number + 1}: not JSON (nested too deeply)") from error
            number += 1
            yield number, _slim(element, fields)
            ended = expect(",]") == "]"
            at += 1
        if (buffer[at:] + text.read(CHUNK)).strip():
            raise UserError(f"{source.path}: something follows the array, after element {number}; one array a file")

    try:
        for batch in _batches(rows()):
            yield {"rows": batch}, None
    except UnicodeDecodeError as error:
        raise UserError(f"{source.path}, after element {number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _csv(source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]) -> Iterator[tuple[dict, None]]:
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter="\t" if ".tsv" in source.path.suffixes else ",", strict=True)
    line = 1
    try:
        header = next(reader, [])
        _some(source, header, fields)

        def rows() -> Iterator[tuple[int, Any]]:
            nonlocal line
            line = reader.line_num + 1
            for row in reader:
                if len(row) == len(header):
                    yield line, _slim(dict(zip(header, row, strict=True)), fields)
                elif row:
                    yield line, BadRecord(f"{len(row)} fields, and the header has {len(header)}")
                line = reader.line_num + 1

        for batch in _batches(rows()):
            yield {"rows": batch}, None
    except csv.Error as error:
        raise UserError(f"{source.path}, line {line}: not CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source.path}, line {line} or after: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _parquet(source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]) -> Iterator[tuple[dict, int]]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as spool:
        if source.compression:  # parquet is read from its end
            shutil.copyfileobj(file, spool, 1 << 20)
            file = spool
        try:
            table = parquet.ParquetFile(file)
            columns = _some(source, table.schema_arrow.names, fields)
            count, number = table.num_row_groups, 0
            for group in range(count):
                at, end = (source.size * i // count for i in (group, group + 1))
                if begins[0] <= at < begins[1]:
                    batches = table.iter_batches(256, row_groups=[group], columns=columns)
                    for rows, share in _shares(_batches(_rows(batches, number)), end - at):
                        yield {"rows": rows}, share
                number += table.metadata.row_group(group).num_rows
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{source.path}: not parquet, or damaged ({error})") from error


def _arrow(source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]) -> Iterator[tuple[dict, int | None]]:
    import pyarrow

    try:
        mapped = file if source.compression else pyarrow.memory_map(str(source.path))
        with pyarrow.ipc.open_stream(mapped) as reader:
            columns, number, before = _some(source, reader.schema.names, fields), 0, 0
            while True:
                at = 0 if source.compression else before
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    break
                before = 0 if source.compression else mapped.tell()
                if begins[0] <= at < begins[1]:
                    for rows, share in _shares(_batches(_rows([batch.select(columns)], number)), before - at):
                        yield {"rows": rows}, None if source.compression else share
                number += batch.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{source.path}: not an arrow stream, as save_to_disk writes it, or damaged ({error})") from error


# (source, file, fields, range of bytes in which the records begin) -> (the chunk's field, bytes of the file that it stands for; None: as read)
READERS = {"jsonl": _lines, "lines": _lines, "json": _array, "csv": _csv, "parquet": _parquet, "arrow": _arrow}


def _some(source: Source, names: Sequence[str], fields: Sequence[str]) -> list[str]:
    if columns := [name for name in fields if name in names]:
        return columns
    has = ", ".join(map(repr, names[:8])) or "nothing"
    raise UserError(f'{source.path}: no column "{fields[0]}" (it has {has}); name another with --jsonl-keys')


def _slim(record: Any, fields: Sequence[str]) -> Any:
    """What a worker needs of a record; the names of the rest are kept for the message when none of it is there."""
    if isinstance(record, dict) and (some := {key: record[key] for key in fields if key in record}):
        return some
    return dict.fromkeys(record) if isinstance(record, dict) else record


def _rows(batches: Iterable, number: int) -> Iterator[tuple[int, Any]]:
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _batches(rows: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Rows by about a chunk of text. A BadRecord among them goes through as it is."""
    some, size = [], 0
    for row in rows:
        some.append(row)
        size += _length(row[1])
        if size >= CHUNK or len(some) == 1 << 14:
            yield some
            some, size = [], 0
    if some:
        yield some


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, list) else 0


def _shares(parts: Iterator, size: int) -> Iterator[tuple[Any, int]]:
    """Each part with bytes for the progress bar: all of them with the first, as nobody knows how many parts follow."""
    for part in parts:
        yield part, size
        size = 0
