"""Which files there are, and their records in chunks, in order: jsonl, json, txt, csv, tsv, parquet, arrow, `datasets` folders; .gz, .zst.

A chunk is what one worker takes at a time. Of a plain file of lines it is a range of bytes, which the worker reads itself.
"""

import dataclasses
import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv.data import formats
from rwkv.data.formats import BOM, READERS, Source, opened
from rwkv.data.jsonl import BadRecord, parse, utf8
from rwkv.errors import UserError

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
        if small and (source.kind != "txt" or len(small) == 1000 or sum(one.size for one in small) >= formats.CHUNK):
            yield Chunk(small[0], sum(one.size for one in small), files=small)
            small = []
        if source.kind == "txt":
            small.append(source)
        elif splits and source.kind in ("jsonl", "lines"):
            for at in range(begins[0], min(begins[1], source.size), formats.CHUNK):
                end = min(at + formats.CHUNK, begins[1], source.size)
                yield Chunk(source, end - at, span=(at, end))
        else:
            yield from _reading(source, READERS[source.kind], fields, begins if splits else (0, source.size + 1))
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
            with opened(source) as (file, _):
                yield number, _attempt(lambda data: dict.fromkeys(keys, utf8(data)), file.read().removeprefix(BOM))
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
        begin, end = chunk.span or (0, chunk.size)
        with open(chunk.source.path, "rb") as file:
            if begin:  # a line that began before belongs to the chunk before
                file.seek(begin - 1)
                begin += len(file.readline()) - 1
            data = file.read(max(end - begin, 0))
            if data and not data.endswith(b"\n"):
                data += file.readline()
            if begin == 0:
                data = data.removeprefix(BOM)
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
    ours = path.name.endswith(".rejects.jsonl") or (path.suffix == ".json" and path.with_suffix(".idx").exists())  # a converter's
    return not hidden and not ours and path.is_file() and _kind(path)[0] is not None


def _kind(path: Path) -> tuple[str | None, str]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    rest = suffixes[:-1] if compression else suffixes
    return _KINDS.get(rest[-1]) if rest else None, compression


def _source(path: Path, split_lines: bool) -> Source:
    kind, compression = _kind(path)
    if kind is None:
        raise UserError(f"{path}: of no known kind; the name must end in {', '.join(_KINDS)}, with or without .gz or .zst")
    stat = path.stat()
    source = Source(path, kind, compression, stat.st_size, stat.st_mtime_ns)
    if kind == "json" and _first_byte(source) == b"{":  # many a .json holds jsonl
        kind = "jsonl"
    return dataclasses.replace(source, kind="lines" if kind == "txt" and split_lines else kind)


def _first_byte(source: Source) -> bytes:
    with opened(source) as (file, _):
        return file.read(1 << 12).removeprefix(BOM).lstrip()[:1]


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


def _reading(source: Source, reader: Callable, fields: Sequence[str], begins: tuple[int, int]) -> Iterator[Chunk]:
    """The chunks of a file that only one process can read."""
    with opened(source) as (file, tell):
        before = 0
        for found, size in reader(source, file, fields, begins):
            taken = tell() - before if size is None else size
            before += taken
            yield Chunk(source, taken, **found)
