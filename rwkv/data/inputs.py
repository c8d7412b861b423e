"""Files of many kinds as chunks of records, in order and in bounded memory: jsonl, json, txt, csv, tsv, parquet, arrow, `datasets` folders; .gz, .zst.

A chunk is what one worker takes at a time. Of a plain file of lines it is a range of bytes, which the worker reads itself.
"""

import csv
import glob
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rwkv.data.jsonl import BadRecord, parse, utf8
from rwkv.errors import UserError

_CHUNK = 1 << 20  # bytes of text that a worker takes at a time
_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_SPLIT = {"jsonl", "lines", "parquet", "arrow"}  # kinds of which a shard can take a part without reading the rest
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
ENDINGS = {*_KINDS, *_COMPRESSIONS}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """A file to convert. kind: jsonl, json, lines (of text), txt (one document), csv, parquet, arrow. compression: gzip, zstd or none."""

    path: Path
    kind: str
    compression: str
    size: int


@dataclass(frozen=True)
class Chunk:
    """Some records of a source, numbered from 0 as they come. One of the fields after `size` says where they are.

    Attributes:
        size: bytes of the source that it stands for.
        span: first byte, and the byte before which the last line begins.
        lines: lines out of a compressed file.
        rows: records with their numbers in the source; what is wrong, in the place of one that cannot be read.
        files: text files, each one document.
    """

    source: Source
    size: int
    span: tuple[int, int] | None = None
    lines: bytes | None = None
    rows: list[tuple[int, Any]] | None = None
    files: list[Source] | None = None


def find(spec: str, split_lines: bool = False) -> list[Source]:
    """The files that a comma-separated list of files, globs and folders names, in its order; those of a glob or folder sorted by name.

    Raises:
        UserError: something that is not there, of no known kind, or a folder or glob without a file of a known kind.
    """
    sources: list[Source] = []
    for word in [spec] if os.path.exists(spec) else spec.split(","):
        if not (word := word.strip()):
            continue
        path = Path(word)
        if path.is_dir():
            found = _dataset(path) or [x for x in sorted(path.rglob("*")) if _is_input(x, path)]
            complaint = f"{path}: a folder without a file that can be converted ({', '.join(_KINDS)}, also with .gz or .zst)"
        elif path.is_file():
            found, complaint = [path], ""
        else:
            found = (
                [x for x in map(Path, sorted(glob.glob(word, recursive=True))) if _is_input(x, x.parent)] if glob.has_magic(word) else []
            )
            complaint = f"{word}: no such file" if not glob.has_magic(word) else f"{word}: matches no file that can be converted"
        if not found:
            raise UserError(complaint)
        sources += [_source(x, split_lines) for x in found]
    return sources


def chunks(sources: Sequence[Source], fields: Sequence[str], shard: tuple[int, int] = (0, 1)) -> Iterator[Chunk]:
    """Every record of the sources that the shard (i of n) owns, in order.

    A record belongs to the shard in whose part of the bytes of all sources it begins; where that cannot be known without reading (json, csv,
    compressed files), the whole file does. `fields` are the only columns read of parquet and arrow; any that is there will do.

    Raises:
        UserError: a file that is damaged, or lacks all the fields.
    """
    total = sum(source.size for source in sources)
    low, high = (total * part // shard[1] for part in (shard[0], shard[0] + 1))
    if shard[0] + 1 == shard[1]:
        high = total + 1  # empty files at the end
    small: list[Source] = []
    start = 0
    for source in sources:
        begins = max(low - start, 0), max(high - start, 0)  # the shard's records begin in this range of the file's bytes
        start += source.size
        splits = source.kind in _SPLIT and not source.compression
        if not (begins[0] < source.size and begins[1] > 0 if splits else begins[0] == 0 < begins[1]):
            continue
        if small and (source.kind != "txt" or len(small) == 1000 or sum(one.size for one in small) >= _CHUNK):
            yield Chunk(small[0], sum(one.size for one in small), files=small)
            small = []
        if source.kind == "txt":
            small.append(source)
        elif splits and source.kind in ("jsonl", "lines"):
            for at in range(begins[0], min(begins[1], source.size), _CHUNK):
                end = min(at + _CHUNK, begins[1], source.size)
                yield Chunk(source, end - at, span=(at, end))
        else:
            yield from _reading(source, _READERS[source.kind], fields, begins if splits else (0, source.size + 1))
    if small:
        yield Chunk(small[0], sum(one.size for one in small), files=small)


def records(chunk: Chunk, lines: Sequence[bytes], keys: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """The chunk's records by number: dicts, or the BadRecord in the place of one that cannot be read. Blank lines are passed over.

    A text file or line of text is a record with the text under every key. Rows carry the number that they have in the source, others count
    from 0 in the chunk.
    """
    if chunk.rows is not None:
        yield from chunk.rows
        return
    if chunk.files is not None:
        for number, source in enumerate(chunk.files):
            with _opened(source) as (file, _):
                yield number, _attempt(lambda data: dict.fromkeys(keys, utf8(data)), file.read().removeprefix(_BOM))
        return
    read = parse if chunk.source.kind == "jsonl" else lambda line: dict.fromkeys(keys, utf8(line.removesuffix(b"\r")))
    for number, line in enumerate(lines):
        if line and not line.isspace():
            yield number, _attempt(read, line)


def lines_of(chunk: Chunk) -> list[bytes]:
    """The lines of a chunk, without their \\n; none if it is made of other records."""
    if chunk.rows is not None or chunk.files is not None:
        return []
    data = chunk.lines
    if data is None:
        begin, end = chunk.span
        with open(chunk.source.path, "rb") as file:
            if begin:  # a line that began before belongs to the chunk before
                file.seek(begin - 1)
                begin += len(file.readline()) - 1
            data = file.read(max(end - begin, 0))
            if data and not data.endswith(b"\n"):
                data += file.readline()
            if begin == 0:
                data = data.removeprefix(_BOM)
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def place(chunk: Chunk, number: int, lines_before: Callable[[], int]) -> str:
    """Where a user finds the record of this number. `lines_before`: how many lines of the source come before the chunk."""
    if chunk.files is not None:
        return str(chunk.files[number].path)
    if chunk.rows is not None:
        unit = {"json": "element", "csv": "line"}.get(chunk.source.kind, "row")
        return f"{chunk.source.path}, {unit} {number}"
    return f"{chunk.source.path}, line {lines_before() + number + 1}"


def count_lines(path: Path, end: int) -> int:
    """Lines of a file that begin before this byte."""
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while end > 0 and (block := file.read(min(end, 1 << 24))):
            count, last, end = count + block.count(b"\n"), block[-1:], end - len(block)
    return count + (last != b"\n")


def _attempt(read: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return read(data)
    except BadRecord as error:
        return error


def _is_input(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and not path.name.endswith(".rejects.jsonl") and path.is_file() and _kind(path)[0] is not None


def _kind(path: Path) -> tuple[str | None, str]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    rest = suffixes[:-1] if compression else suffixes
    return _KINDS.get(rest[-1]) if rest else None, compression


def _source(path: Path, split_lines: bool) -> Source:
    kind, compression = _kind(path)
    if kind is None:
        raise UserError(f"{path}: of no known kind; the name must end in {', '.join(_KINDS)}, with or without .gz or .zst")
    source = Source(path, kind, compression, path.stat().st_size)
    if kind == "json" and _first_byte(source) == b"{":  # many a .json holds jsonl
        kind = "jsonl"
    return Source(path, "lines" if kind == "txt" and split_lines else kind, compression, source.size)


def _first_byte(source: Source) -> bytes:
    with _opened(source) as (file, _):
        return file.read(1 << 12).removeprefix(_BOM).lstrip()[:1]


def _dataset(folder: Path) -> list[Path]:
    """The arrow files of a folder that datasets' save_to_disk made, of all its splits; empty if it is no such folder."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        return [file for split in _json(splits).get("splits", []) for file in _dataset(folder / split)]
    state = folder / "state.json"
    if not state.is_file():
        return []
    return [folder / entry["filename"] for entry in _json(state).get("_data_files", [])]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); the datasets folder is damaged") from error


class _opened:
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


def _reading(source: Source, reader: Callable, fields: Sequence[str], begins: tuple[int, int]) -> Iterator[Chunk]:
    """The chunks of a file that only one process can read."""
    with _opened(source) as (file, tell):
        before = 0
        for found, size in reader(source, file, fields, begins):
            taken = tell() - before if size is None else size
            before += taken
            yield Chunk(source, taken, **found)


def _lines(source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]) -> Iterator[tuple[dict, None]]:
    first = True
    while data := file.read(_CHUNK):
        data += file.readline()
        yield {"lines": data.removeprefix(_BOM) if first else data}, None
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
            buffer, at = text.read(_CHUNK), 0
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
                more = text.read(max(_CHUNK, len(buffer) - at)) if cut else ""
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
        if (buffer[at:] + text.read(_CHUNK)).strip():
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


_READERS = {"jsonl": _lines, "lines": _lines, "json": _array, "csv": _csv, "parquet": _parquet, "arrow": _arrow}


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


def _rows(batches: Iterator, number: int) -> Iterator[tuple[int, Any]]:
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
        if size >= _CHUNK or len(some) == 1 << 14:
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
