"""How each format is read: a file to batches of records, or of lines, in order and in bounded memory. Corrupt files are named with the place."""

import contextlib
import csv
import io
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from rwkv.data.convert import transcode
from rwkv.data.convert.jsonl import DECODER, BadRecord, hint, repeated
from rwkv.errors import UserError

CHUNK = 1 << 20  # bytes of text that a worker takes at a time
BOM = b"\xef\xbb\xbf"
TEXT = {"jsonl", "json", "lines", "txt", "csv"}  # kinds that are text in some encoding
MAX_RECORD = 1 << 30
_BATCH = 1 << 28  # bytes that a batch of parquet rows may have
_DICTIONARY_PAGE = 2
_EXPANDED = 1 << 26  # bytes of rows that are turned into Python objects together
_DEEPEST = 100  # levels of nesting that a record may have


@dataclass(frozen=True)
class Source:
    """A file to convert.

    Attributes:
        path: as the user knows it.
        kind: jsonl, json, lines (of text), txt (one document), csv, parquet, arrow.
        compression: gzip, zstd or none.
        size: bytes as stored.
        delimiter: of csv.
        encoding: of text; "" is UTF-8.
        keep_crlf: leave the line ends of Windows in txt as they are.
        max_record: bytes of the largest record that is read.
        identity: device, inode, size and time of change (ns) when it was found; none: not to be compared.
        spool: where the bytes are, if not under path, which may be a pipe.
    """

    path: Path
    kind: str
    compression: str
    size: int
    delimiter: str = ","
    encoding: str = ""
    keep_crlf: bool = False
    max_record: int = MAX_RECORD
    identity: tuple[int, int, int, int] | None = None
    spool: str = ""

    @property
    def mtime_ns(self) -> int:
        """When it was changed, ns since 1970; 0 if not known."""
        return self.identity[3] if self.identity else 0

    @property
    def stored(self) -> str | Path:
        """Where the bytes are."""
        return self.spool or self.path

    @property
    def plain(self) -> bool:
        """Whether the bytes are UTF-8 as they are stored, so that a part of the file can be read without the rest."""
        return not self.compression and not self.encoding

    @property
    def too_large(self) -> BadRecord:
        """What is wrong with a record over max_record."""
        size = f"{self.max_record >> 20:,} MiB" if self.max_record >> 20 else f"{self.max_record:,} bytes"
        return BadRecord(f"a record of more than {size}; if it is meant so and fits into memory, raise --max_record_mb")

    def refuse_size(self, where: str) -> NoReturn:
        """Raise UserError for a record over max_record that was not read to its end."""
        raise UserError(f"{self.path}, {where}: {self.too_large}")


class opened:
    """(the decompressed bytes of a source, in UTF-8 if it is text, how many bytes of the file have been read so far); corruption is a UserError."""

    def __init__(self, source: Source):
        self._source = source

    def __enter__(self) -> tuple[BinaryIO, Callable[[], int]]:
        self._raw = open(self._source.stored, "rb")
        file: Any = self._raw
        if self._source.compression:
            import pyarrow  # a fifth of a second, and plain jsonl needs none of it

            # not Python's gzip or zstandard: the second takes a file that is cut short for a whole one
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._raw, "r"), self._source.compression)
            file = io.BufferedReader(stream, 1 << 18)
        if self._source.encoding:
            file = io.BufferedReader(transcode.Transcoded(file, self._source.encoding), 1 << 18)
        return file, self._raw.tell

    def __exit__(self, kind, error, _):
        self._raw.close()
        if isinstance(error, OSError) and not error.errno:  # pyarrow's
            raise UserError(f"{self._source.path}: corrupt or cut short ({error})") from error


def read_line(source: Source, file: BinaryIO, where: str) -> bytes:
    """The next line of a file. Raises UserError if it is longer than a record may be."""
    line = file.readline(source.max_record + 1)
    return source.refuse_size(where) if len(line) > source.max_record else line


def is_json_line(head: bytes) -> bool:
    """Whether the beginning of a file is a whole JSON value on a line, and more lines follow it."""
    line, newline, rest = head.partition(b"\n")
    if not newline or not rest.strip():
        return False
    try:
        DECODER.decode(line.decode("utf-8", "replace").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _lines(
    source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]
) -> Iterator[tuple[dict, None]]:
    first, count = True, 0
    while data := file.read(CHUNK):
        # A chunk ends with a line. Where it is, only counts if there is no end in sight.
        data += read_line(source, file, f"after line {count + data.count(10)}")
        count += data.count(10)
        yield {"lines": data.removeprefix(BOM) if first else data}, None
        first = False


def _array(
    source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]
) -> Iterator[tuple[dict, None]]:
    """A JSON array, element by element. The buffer holds a block or the longest element, whichever is longer.

    By the standard library: ijson puts `?` for half of a surrogate pair and stops at NaN and at long numbers.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    decode, buffer, at, number, ended = DECODER.raw_decode, "", 0, 0, False

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
            raise UserError(
                f"{source.path}: after element {number} there is {buffer[at]!r}, expected {' or '.join(characters)}"
            )
        return buffer[at]

    def more() -> bool:
        """Read on; whether there was anything."""
        nonlocal buffer, at
        if len(buffer) - at > source.max_record:
            source.refuse_size(f"element {number + 1}")
        block = text.read(max(CHUNK, len(buffer) - at))
        buffer, at = buffer[at:] + block, 0
        return bool(block)

    def skip() -> None:
        """Pass an element that is nested too deeply for the decoder: to the bracket that closes its first."""
        nonlocal at
        depth, in_string, i = 0, False, at
        while True:
            while i >= len(buffer):
                i -= at
                if not more():
                    raise UserError(f"{source.path}, element {number + 1}: not JSON (nested too deeply, and cut short)")
            letter = buffer[i]
            if in_string:
                i += letter == "\\"
                in_string = letter != '"'
            elif letter == '"':
                in_string = True
            elif letter in "[{":
                depth += 1
            elif letter in "]}":
                depth -= 1
            i += 1
            if not depth:
                at = i
                return

    def rows() -> Iterator[tuple[int, Any]]:
        nonlocal buffer, at, number, ended
        expect("[")
        at += 1
        if ended := expect("") == "]":
            at += 1
        while not ended:
            expect("")
            element: Any
            try:
                element, end = decode(buffer, at)
                if end == len(buffer) and more():  # a number may go on
                    continue
                element = repeated(buffer[at:end], element) or element
                at += end - at
            except json.JSONDecodeError as error:
                reason = hint(buffer, error.pos, error.msg)
                cut = error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 64
                if not cut or not more():
                    raise UserError(f"{source.path}, element {number + 1}: not JSON ({reason or error.msg})") from error
                continue
            except RecursionError:
                skip()
                element = BadRecord("nested too deeply")
            if not isinstance(element, BadRecord) and length(element, _DEEPEST) is None:
                element = BadRecord(f"nested too deeply (more than {_DEEPEST} levels)")
            number += 1
            yield number, _slim(element, fields)
            ended = expect(",]") == "]"
            at += 1
        if (buffer[at:] + text.read(CHUNK)).strip():
            raise UserError(f"{source.path}: something follows the array, after element {number}; one array a file")

    try:
        for batch in _batches(source, rows()):
            yield {"rows": batch}, None
    except UnicodeDecodeError as error:
        raise UserError(f"{source.path}, after element {number}: {_not_in(source)} ({error.reason})") from error


def _not_in(source: Source) -> str:
    return f"not {source.encoding}" if source.encoding else "not UTF-8"


def _csv(source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]) -> Iterator[tuple[dict, None]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    line = 1

    def lines() -> Iterator[str]:
        size = 0  # of a record, which may have several lines
        while some := text.readline(source.max_record + 1):
            size = size + len(some) if record == line else len(some)
            if size > source.max_record:
                source.refuse_size(f"line {line}")
            yield some

    record = 0  # the line where the record begins that the reader is in
    limit = csv.field_size_limit(sys.maxsize)  # lines are limited above
    try:
        feed = lines()
        first = next(feed, "")
        reader = csv.reader(
            itertools.chain([first] if first else [], feed), delimiter=_delimiter(source, first, fields), strict=True
        )
        header = next(reader, [])
        if twice := next((name for name in _some(source, header, fields) if header.count(name) > 1), None):
            raise UserError(f"{source.path}: two columns are named {twice!r}; rename one of them")

        def rows() -> Iterator[tuple[int, Any]]:
            nonlocal line, record
            line = record = reader.line_num + 1
            for row in reader:
                if len(row) == len(header):
                    yield line, _slim(dict(zip(header, row, strict=True)), fields)
                elif row:
                    yield line, BadRecord(f"{len(row)} fields, and the header has {len(header)}")
                line = record = reader.line_num + 1

        for batch in _batches(source, rows()):
            yield {"rows": batch}, None
    except csv.Error as error:
        raise UserError(f"{source.path}, line {line}: not CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source.path}, line {line} or after: {_not_in(source)} ({error.reason})") from error
    finally:
        csv.field_size_limit(limit)


def _delimiter(source: Source, header: str, fields: Sequence[str]) -> str:
    """The delimiter that the name says, unless the header has the column only with another one that spreadsheets write."""
    for delimiter in dict.fromkeys((source.delimiter, "\t", ";", ",")):
        with contextlib.suppress(csv.Error, StopIteration):
            if set(fields) & set(next(csv.reader([header], delimiter=delimiter))):
                return delimiter
    return source.delimiter


def _parquet(
    source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]
) -> Iterator[tuple[dict, int]]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as spool:
        if source.compression:  # parquet is read from its end
            shutil.copyfileobj(file, spool, 1 << 20)
            file = spool
        try:
            table = parquet.ParquetFile(file)
            columns = _some(source, table.schema_arrow.names, fields)
            size, kept = _batch(table, file, columns)
            if kept:
                table = parquet.ParquetFile(file, read_dictionary=kept)
            count, number = table.num_row_groups, 0
            for group in range(count):
                at, end = (source.size * i // count for i in (group, group + 1))
                if begins[0] <= at < begins[1]:
                    batches = table.iter_batches(size, row_groups=[group], columns=columns)
                    for rows, share in _shares(_batches(source, _rows(batches, number)), end - at):
                        yield {"rows": rows}, share
                number += table.metadata.row_group(group).num_rows
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{source.path}: not parquet, or corrupt ({error})") from error


def _batch(table: Any, file: BinaryIO, columns: Sequence[str]) -> tuple[int, list[str]]:
    """Rows to read together, at most 256, and the columns to leave as dictionaries, so that a batch is of bounded size: a text that is stored
    once may be in every row, and as often as it likes in one row of lists."""
    rows, kept = 256, set()
    for group in range(table.num_row_groups):
        metadata = table.metadata.row_group(group)
        for column in map(metadata.column, range(metadata.num_columns)):
            if (
                column.physical_type == "BYTE_ARRAY"
                and column.path_in_schema.split(".")[0] in columns
                and metadata.num_rows
            ):
                a_row = _longest(file, column) * max(1, column.num_values // metadata.num_rows)
                if a_row > _BATCH // 4:
                    kept.add(column.path_in_schema)
                else:
                    rows = min(rows, max(1, _BATCH // max(1, a_row)))
    return rows, sorted(kept)


def _longest(file: BinaryIO, column: Any) -> int:
    """Bytes that a text of a parquet column may have and be stored once for many rows: the size of its dictionary, as the page's header says."""
    if any(encoding.startswith("DELTA_BYTE_ARRAY") for encoding in column.encodings):
        return column.total_uncompressed_size
    file.seek(column.dictionary_page_offset or column.data_page_offset)
    head, at, fields = file.read(32), 0, []
    for _ in range(2):  # type and size, the first fields of the header, in Thrift's compact protocol
        if head[at : at + 1] != b"\x15":
            return column.total_uncompressed_size
        at, number, shift = at + 1, 0, 0
        while at < len(head):
            number, shift, at = number | (head[at] & 127) << shift, shift + 7, at + 1
            if head[at - 1] < 128:
                break
        fields.append(number >> 1)
    return fields[1] if fields[0] == _DICTIONARY_PAGE else 0


def _arrow(
    source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]
) -> Iterator[tuple[dict, int | None]]:
    import pyarrow

    with contextlib.ExitStack() as stack:
        try:
            mapped = (
                file if source.compression else stack.enter_context(pyarrow.OSFile(str(source.stored)))
            )  # not mapped: a file that is cut short would end us
            reader = stack.enter_context(pyarrow.ipc.open_stream(mapped))
            columns, number, before = _some(source, reader.schema.names, fields), 0, 0
            while True:
                at = 0 if source.compression else before
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    break
                before = 0 if source.compression else mapped.tell()
                if begins[0] <= at < begins[1]:
                    batch = batch.select(columns)
                    batch.validate(full=True)  # offsets that lead out of the file would be followed
                    for rows, share in _shares(_batches(source, _rows([batch], number)), before - at):
                        yield {"rows": rows}, None if source.compression else share
                number += batch.num_rows
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise UserError(
                f"{source.path}: not an arrow stream, as save_to_disk writes it, or corrupt ({error})"
            ) from error


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
    """Rows by number, some at a time: a dictionary's one long text may be in all of them. One that cannot be read is a BadRecord."""
    for batch in batches:
        step = max(1, min(256, _EXPANDED // max(1, batch.nbytes)))
        for first in range(0, batch.num_rows, step):
            part = batch.slice(first, step)
            try:
                rows = part.to_pylist()
            except Exception:  # such as a time out of range, or bytes that are not UTF-8
                rows = [_row(part.slice(i, 1)) for i in range(part.num_rows)]
            for row in rows:
                number += 1
                yield number, row


def _row(part: Any) -> Any:
    try:
        return part.to_pylist()[0]
    except Exception as error:
        return BadRecord(f"cannot be read ({type(error).__name__}: {error})")


def _batches(source: Source, rows: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Rows by about a chunk of text. A BadRecord among them goes through as it is."""
    some, size = [], 0
    for number, row in rows:
        long = length(row, _DEEPEST)
        if long is None:
            row, long = BadRecord(f"nested too deeply (more than {_DEEPEST} levels)"), 0
        if long > source.max_record:
            row, long = source.too_large, 0
        some.append((number, row))
        size += long
        if size >= CHUNK or len(some) == 1 << 14:
            yield some
            some, size = [], 0
    if some:
        yield some


def length(value: Any, deepest: int) -> int | None:
    """Characters in a record; None if it is nested more than `deepest` levels. Not recursive: records may be nested as deeply as they like."""
    total, level, depth = 0, [value], 0
    while level:
        below: list[Any] = []
        for one in level:
            if isinstance(one, str | bytes):
                total += len(one)
            elif isinstance(one, dict):
                below += one.values()
            elif isinstance(one, list):
                below += one
        level, depth = below, depth + 1
        if depth > deepest + 1:
            return None
    return total


def _shares(parts: Iterator, size: int) -> Iterator[tuple[Any, int]]:
    """Each part with bytes for the progress bar: all of them with the first, as nobody knows how many parts follow."""
    for part in parts:
        yield part, size
        size = 0
