"""Records of input files in chunks, in order: jsonl, json, txt, csv, tsv, parquet, arrow; .gz,
.zst.

A chunk is the unit of work of a worker. For an uncompressed file of lines it is a byte range that
the worker reads itself.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv.data.convert import columnar_readers, source_file, text_readers
from rwkv.data.convert.jsonl import BadRecord, decode_utf8, parse
from rwkv.data.convert.source_file import BOM, Source, open_source, read_line
from rwkv.errors import UserError

# (source, file, fields, range of bytes in which the records begin) -> iterator of (the Chunk's
# field, bytes of the file it accounts for; None: as many as were read)
_READERS = {**text_readers.READERS, **columnar_readers.READERS}
_SPLIT = {"jsonl", "lines", "parquet", "arrow"}  # formats of which a shard can read a part alone


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of a source. Exactly one of the fields after `size` is set.

    Attributes:
        size: bytes of the source accounted for, for the progress bar.
        span: byte range in which the lines begin.
        lines: lines of a compressed file.
        rows: (number in the source, record); a BadRecord in place of an unreadable one.
        files: text files, each one document.
    """

    source: Source
    size: int
    span: tuple[int, int] | None = None
    lines: bytes | None = None
    rows: list[tuple[int, Any]] | None = None
    files: list[Source] | None = None


def chunks(
    sources: Sequence[Source], fields: Sequence[str], shard: tuple[int, int] = (0, 1)
) -> Generator[Chunk, None, None]:
    """All records of the sources that belong to a shard, in order.

    The bytes of all sources are divided evenly among the shards. A record belongs to the shard in
    whose range it begins; json, csv and compressed files belong to one shard as a whole.

    Args:
        fields: the columns to read of parquet and arrow; at least one must be present.
        shard: (i, n): shard i of n.

    Raises:
        UserError: a file is corrupt, or has none of the fields.
    """
    total = sum(source.size for source in sources)
    low, high = (total * part // shard[1] for part in (shard[0], shard[0] + 1))
    if shard[0] + 1 == shard[1]:
        high = total + 1  # empty files at the end
    small: list[Source] = []
    start = 0
    for source in sources:
        # the shard's records begin in this byte range of the file
        begins = max(low - start, 0), max(high - start, 0)
        start += source.size
        splits = source.kind in _SPLIT and source.plain
        if not (begins[0] < source.size and begins[1] > 0 if splits else begins[0] == 0 < begins[1]):
            continue
        if small and (
            source.kind != "txt" or len(small) == 1000 or sum(file.size for file in small) >= source_file.CHUNK
        ):
            yield Chunk(small[0], sum(file.size for file in small), files=small)
            small = []
        if source.kind == "txt":
            small.append(source)
        elif splits and source.kind in ("jsonl", "lines"):
            for at in range(begins[0], min(begins[1], source.size), source_file.CHUNK):
                end = min(at + source_file.CHUNK, begins[1], source.size)
                yield Chunk(source, end - at, span=(at, end))
        else:
            yield from _reading(source, _READERS[source.kind], fields, begins if splits else (0, source.size + 1))
    if small:
        yield Chunk(small[0], sum(file.size for file in small), files=small)


def records(chunk: Chunk, lines: Sequence[bytes], keys: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """The chunk's numbered records: dicts, or a BadRecord in place of an unreadable one. Blank
    lines are skipped.

    A text file or line of text is a record with the text under every key. Rows keep their number in
    the source; other records are numbered from 0 within the chunk.
    """
    if chunk.rows is not None:
        yield from chunk.rows
        return
    if chunk.files is not None:
        for number, source in enumerate(chunk.files):
            with open_source(source) as (file, _):
                data = file.read(source.max_record + 1)
            if len(data) > source.max_record:
                source.reject_size("the whole file (--split_lines makes every line a document)")
            if source.plain and len(data) < source.size:
                raise UserError(
                    f"{source.path}: was truncated while it was read; convert again when nothing writes to it"
                )
            yield number, _attempt(source, functools.partial(_document, source, keys), data.removeprefix(BOM))
        return
    read = (
        parse
        if chunk.source.kind == "jsonl"
        else lambda line: dict.fromkeys(keys, decode_utf8(line.removesuffix(b"\r")))
    )
    for number, line in enumerate(lines):
        if len(line) > chunk.source.max_record:
            yield number, chunk.source.too_large
        elif line and not line.isspace():
            yield number, _attempt(chunk.source, read, line)


def lines_of(chunk: Chunk) -> list[bytes]:
    """The lines of a chunk, without their \\n; empty if it does not consist of lines."""
    if chunk.rows is not None or chunk.files is not None:
        return []
    lines = (_read(chunk) if chunk.lines is None else chunk.lines).split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def loaded(chunk: Chunk, keys: Sequence[str]) -> Chunk:
    """The chunk with its contents, for a worker that cannot read the source."""
    if chunk.files is not None:
        return Chunk(chunk.source, chunk.size, rows=list(records(chunk, [], keys)))
    if chunk.span is not None:
        return Chunk(chunk.source, chunk.size, lines=_read(chunk))
    return chunk


def _read(chunk: Chunk) -> bytes:
    """The lines that begin in the chunk's byte range."""
    begin, end = chunk.span or (0, chunk.size)
    source = chunk.source
    with open(source.stored, "rb") as file:
        file.seek(max(begin - 1, 0))
        data = file.read(end - begin)
        if len(data) < end - begin:
            raise UserError(f"{source.path}: was truncated while it was read; convert again when nothing writes to it")
        if begin:  # a line that began earlier belongs to the previous chunk
            _, newline, data = data.partition(b"\n")
            data += file.read(1) if newline else b""
        if data and not data.endswith(b"\n"):
            data += read_line(source, file, f"before byte {end:,}")
        return data.removeprefix(BOM) if begin == 0 else data


def place(chunk: Chunk, number: int, lines_before: Callable[[], int]) -> str:
    """Location of a record for messages. `lines_before`: returns the number of lines of the source
    before the chunk.
    """
    if chunk.files is not None:
        return str(chunk.files[number].path)
    if chunk.rows is not None:
        unit = {"json": "element", "csv": "line"}.get(chunk.source.kind, "row")
        return f"{chunk.source.path}, {unit} {number}"
    return f"{chunk.source.path}, line {lines_before() + number + 1}"


def count_lines(path: str | Path, end: int) -> int:
    """Number of lines of a file that begin before byte `end`."""
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while end > 0 and (block := file.read(min(end, 1 << 24))):
            count, last, end = count + block.count(b"\n"), block[-1:], end - len(block)
    return count + (last != b"\n")


def _attempt(source: Source, read: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return read(data)
    except BadRecord as error:
        # Utf8Stream turns bytes that are not valid in the encoding into invalid UTF-8
        if source.encoding and str(error).startswith("not UTF-8"):
            return BadRecord(f"not {source.encoding}; pass the encoding of this file as --encoding")
        return error


def _document(source: Source, keys: Sequence[str], data: bytes) -> dict[str, str]:
    """The record of a txt file, with line endings normalised to \\n unless keep_crlf."""
    text = decode_utf8(data)
    if not source.keep_crlf and "\r" in text:
        text = text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")
    return dict.fromkeys(keys, text)


def _reading(source: Source, reader: Callable, fields: Sequence[str], begins: tuple[int, int]) -> Iterator[Chunk]:
    """The chunks of a file that must be read sequentially."""
    with open_source(source) as (file, tell), contextlib.closing(reader(source, file, fields, begins)) as parts:
        before = 0
        for found, size in parts:
            taken = tell() - before if size is None else size
            before += taken
            yield Chunk(source, taken, **found)
