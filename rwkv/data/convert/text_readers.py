"""Read jsonl, lines of text, JSON arrays and CSV into batches of lines or records, in order and in
bounded memory.
"""

import contextlib
import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from rwkv.data.convert import source_file
from rwkv.data.convert.batches import MAX_DEPTH, batches, keep_fields, nested_length, select_columns
from rwkv.data.convert.jsonl import DECODER, BadRecord, duplicate_key, likely_cause
from rwkv.data.convert.source_file import BOM, Source, read_line
from rwkv.errors import UserError


def is_json_line(head: bytes) -> bool:
    """Whether the beginning of a file is a complete JSON value on one line, followed by more
    lines.
    """
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
    while data := file.read(source_file.CHUNK):
        # A chunk ends at the end of a line.
        data += read_line(source, file, f"after line {count + data.count(10)}")
        count += data.count(10)
        yield {"lines": data.removeprefix(BOM) if first else data}, None
        first = False


def _array(
    source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]
) -> Iterator[tuple[dict, None]]:
    """Read a JSON array element by element. The buffer holds one block or the longest element,
    whichever is longer.

    Uses the standard library: ijson replaces lone surrogates with `?` and fails on NaN and long
    numbers.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    decode, buffer, at, number, ended = DECODER.raw_decode, "", 0, 0, False

    def expect(characters: str) -> str:
        """The next non-space character, which must be one of `characters` if given."""
        nonlocal buffer, at
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n":
                at += 1
            if at < len(buffer):
                break
            buffer, at = text.read(source_file.CHUNK), 0
            if not buffer:
                raise UserError(
                    f"{source.path}: truncated after element {number}: the array does not end; copy or download it again"
                )
        if characters and buffer[at] not in characters:
            raise UserError(
                f"{source.path}: after element {number} there is {buffer[at]!r}, expected {' or '.join(characters)}; correct the file there"
            )
        return buffer[at]

    def more() -> bool:
        """Read another block into the buffer; False at the end of the file."""
        nonlocal buffer, at
        if len(buffer) - at > source.max_record:
            source.reject_size(f"element {number + 1}")
        block = text.read(max(source_file.CHUNK, len(buffer) - at))
        buffer, at = buffer[at:] + block, 0
        return bool(block)

    def skip() -> None:
        """Skip an element that is nested too deeply for the decoder, to its closing bracket."""
        nonlocal at
        depth, in_string, i = 0, False, at
        while True:
            while i >= len(buffer):
                i -= at
                if not more():
                    raise UserError(
                        f"{source.path}, element {number + 1}: not JSON (nested too deeply, and truncated); copy or download the file again"
                    )
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
                if end == len(buffer) and more():  # a number may continue
                    continue
                element = duplicate_key(buffer[at:end], element) or element
                at += end - at
            except json.JSONDecodeError as error:
                reason = likely_cause(buffer, error.pos, error.msg)
                cut = error.msg.startswith("Unterminated string") or error.pos > len(buffer) - 64
                if not cut or not more():
                    raise UserError(
                        f"{source.path}, element {number + 1}: not JSON ({reason or error.msg}); correct it"
                    ) from error
                continue
            except RecursionError:
                skip()
                element = BadRecord("nested too deeply")
            if not isinstance(element, BadRecord) and nested_length(element, MAX_DEPTH) is None:
                element = BadRecord(f"nested too deeply (more than {MAX_DEPTH} levels)")
            number += 1
            yield number, keep_fields(element, fields)
            ended = expect(",]") == "]"
            at += 1
        if (buffer[at:] + text.read(source_file.CHUNK)).strip():
            raise UserError(
                f"{source.path}: there is data after the array, after element {number}; a file must contain one array"
            )

    try:
        for batch in batches(source, rows()):
            yield {"rows": batch}, None
    except UnicodeDecodeError as error:
        raise UserError(f"{source.path}, after element {number}: {_not_decodable(source)} ({error.reason})") from error
    finally:
        text.close()


def _not_decodable(source: Source) -> str:
    return f"not {source.encoding}" if source.encoding else "not UTF-8"


def _csv(source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]) -> Iterator[tuple[dict, None]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    line = 1

    def lines() -> Iterator[str]:
        size = 0  # of the current record, which may span several lines
        while piece := text.readline(source.max_record + 1):
            size = size + len(piece) if record == line else len(piece)
            if size > source.max_record:
                source.reject_size(f"line {line}")
            yield piece

    record = 0  # first line of the current record
    limit = csv.field_size_limit(sys.maxsize)  # lines are limited above
    try:
        feed = lines()
        first = next(feed, "")
        reader = csv.reader(
            itertools.chain([first] if first else [], feed), delimiter=_delimiter(source, first, fields), strict=True
        )
        header = next(reader, [])
        if twice := next((name for name in select_columns(source, header, fields) if header.count(name) > 1), None):
            raise UserError(f"{source.path}: two columns are named {twice!r}; rename one of them")

        def rows() -> Iterator[tuple[int, Any]]:
            nonlocal line, record
            line = record = reader.line_num + 1
            for row in reader:
                if len(row) == len(header):
                    yield line, keep_fields(dict(zip(header, row, strict=True)), fields)
                elif row:
                    yield line, BadRecord(f"{len(row)} fields, but the header has {len(header)}")
                line = record = reader.line_num + 1

        for batch in batches(source, rows()):
            yield {"rows": batch}, None
    except csv.Error as error:
        raise UserError(
            f'{source.path}, line {line}: not CSV ({error}); in a quoted field write " as "", and end every quoted field with a quote'
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source.path}, line {line} or after: {_not_decodable(source)} ({error.reason})") from error
    finally:
        csv.field_size_limit(limit)
        text.close()


def _delimiter(source: Source, header: str, fields: Sequence[str]) -> str:
    """The delimiter implied by the file name, or another common one if only that yields a header
    with one of the fields.
    """
    for delimiter in dict.fromkeys((source.delimiter, "\t", ";", ",")):
        with contextlib.suppress(csv.Error, StopIteration):
            if set(fields) & set(next(csv.reader([header], delimiter=delimiter))):
                return delimiter
    return source.delimiter


# Arguments and yields are those of inputs._READERS.
READERS = {"jsonl": _lines, "lines": _lines, "json": _array, "csv": _csv}
