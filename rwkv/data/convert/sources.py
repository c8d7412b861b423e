"""Find the input files of a conversion: paths, globs and folders of --input, in natural order, by
dataset split.
"""

import dataclasses
import glob
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv.data.convert import encodings, natural_order, source_file, splits, text_readers
from rwkv.data.convert.source_file import BOM, Source, open_source
from rwkv.errors import UserError
from rwkv.files import disk_errors

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FORMATS = ("jsonl", "json", "txt", "csv", "tsv", "parquet", "arrow")  # of --input_format
_TABS = {".tsv", ".tab"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
SUFFIXES = {*KINDS, *_COMPRESSIONS}
# Metadata of the datasets library, without records.
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass
class Found:
    """Files to convert.

    Attributes:
        sources: in the order of conversion.
        used, omitted: names of dataset splits, if any.
        notes: messages for the user: order, skipped files, encodings.
    """

    sources: list[Source] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    omitted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(spec: str, split_lines: bool = False, split: str = "", encoding: str = "", input_format: str = "") -> Found:
    """Expand a comma-separated list of files, globs and folders, in its order; globs and folders in
    natural order.

    Args:
        spec: paths may contain commas and begin with ~. `-`, a FIFO or /dev/stdin is read to its
            end into a temporary file.
        split_lines: each line of a txt file is a document.
        split: comma-separated dataset splits to convert, or `all`; "": train.
        encoding: of text files that are not UTF-8.
        input_format: format of the files given by path, overriding their suffixes.

    Raises:
        UserError: a path that does not exist, cannot be read or has an unknown format; a folder or
            glob without a convertible file; a split that does not exist.
    """
    if input_format and input_format not in FORMATS:
        raise UserError(f"--input_format {input_format}: expected one of {', '.join(FORMATS)}")
    encodings.check(encoding)
    found, requested, direct = Found(), splits.parse(split), False
    known: set[str] = set()
    for word in split_paths(spec):
        path = Path(os.path.expanduser(word)) if not os.path.exists(word) else Path(word)
        if path.is_dir():
            paths = _folder(path, requested, found, known)
        elif glob.has_magic(str(path)) and not path.exists():
            paths = [x for x in map(Path, glob.iglob(str(path), recursive=True)) if _is_input(x, x.parent)]
            if not paths:
                raise UserError(
                    f"{word}: matches no file that can be converted ({', '.join(KINDS)}); check the path and the suffixes"
                )
            paths = _select(
                natural_order.natural(paths),
                Path(os.path.commonpath([x.parent for x in paths])),
                requested,
                found,
                known,
            )
        else:
            paths, direct = [path], True
        if len(paths) > 1:
            found.notes.append(f"order: {natural_order.format_names(paths)}")
        found.sources += [_source(x, split_lines, input_format if paths == [path] else "", encoding) for x in paths]
    if requested and known and not found.used:
        raise UserError(
            f"--split {split}: no such split; there {'is' if len(known) == 1 else 'are'} {', '.join(sorted(known))}"
        )
    if requested and requested != ["all"] and not known:
        raise UserError(f"--split {split}: {spec} has no splits; omit the flag")
    if input_format and found.sources and not direct:
        raise UserError(
            f"--input_format {input_format}: applies to files given by path, but {spec} is a folder or glob"
        )
    if found.omitted:
        found.notes.append(
            f"splits: {', '.join(found.used)} used; {', '.join(found.omitted)} omitted (convert them with --split NAME or --split all; a"
            " validation split converted separately can be given to training as --val_file)"
        )
    if encoding:
        found.sources = _with_encoding(found, encoding)
    return found


def split_paths(spec: str) -> list[str]:
    """Split a comma-separated list of paths. Existing paths may contain commas: the longest
    existing path wins.
    """
    parts, found, at = spec.split(","), [], 0
    while at < len(parts):
        for end in range(len(parts), at, -1):
            word = ",".join(parts[at:end])
            candidates = [x for x in (word, word.strip()) if x and os.path.exists(os.path.expanduser(x))]
            if candidates or end == at + 1:
                found += candidates[:1] or ([word.strip()] if word.strip() else [])
                at = end
                break
    return ["/dev/stdin" if word == "-" else word for word in found]


def check_unchanged(sources: Sequence[Source]) -> None:
    """Raise UserError if a source was changed, replaced or removed since it was found."""
    for source in sources:
        if source.spool or not source.identity:
            continue
        try:
            now = _identity(os.stat(source.path))
        except OSError as error:
            raise UserError(
                f"{source.path}: was removed while it was read ({error.strerror}); convert again when it is complete"
            ) from error
        if now != source.identity:
            sizes = f" ({source.size:,} bytes at the start, {now[2]:,} at the end)" if now[2] != source.size else ""
            what = "replaced by another file" if now[:2] != source.identity[:2] else "changed"
            raise UserError(
                f"{source.path}: was {what} while it was read{sizes}; nothing was written. Convert again when nothing writes to it"
            )


def is_own_output(path: Path) -> bool:
    """Whether a file was written by the converter: rejects, or the manifest of a binidx."""
    return path.name.endswith(".rejects.jsonl") or (path.suffix == ".json" and path.with_suffix(".idx").exists())


def _folder(folder: Path, requested: Sequence[str], found: Found, known: set[str]) -> list[Path]:
    if dataset := splits.dataset(folder):
        return _select_splits(dataset, folder, requested, found, known)
    paths, other = [], []
    for path in _walk(folder):
        if _is_input(path, folder):
            paths.append(path)
        elif not path.name.startswith(".") and not is_own_output(path):
            other.append(path)
    if not paths:
        raise UserError(
            f"{folder}: a folder without a file that can be converted ({', '.join(KINDS)}, also with .gz or .zst); pass files, or another folder"
        )
    if other:
        found.notes.append(f"skipped: {natural_order.format_names(natural_order.natural(other))}: unknown format")
    return _select(natural_order.natural(paths), folder, requested, found, known)


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, following links; hidden folders are skipped."""

    def fail(error: OSError) -> None:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); change its permissions, or list the other files"
        )

    seen = set()
    for at, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        here = os.stat(at)
        if (here.st_dev, here.st_ino) in seen:  # a cycle of links
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(at, name) for name in names)


def _is_input(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    if hidden or is_own_output(path) or path.name in _METADATA or kind_of(path)[0] is None or path.is_dir():
        return False
    if not path.exists():
        raise UserError(f"{path}: a broken symbolic link; download its target, or remove the link")
    return path.is_file()


def _select(paths: list[Path], root: Path, requested: Sequence[str], found: Found, known: set[str]) -> list[Path]:
    if len(paths) == 1:
        return paths
    by_split, rest = splits.of_files(paths, root)
    if not by_split:
        return paths
    chosen = _select_splits(by_split, root, requested, found, known)
    if requested == ["all"]:
        return natural_order.natural([*chosen, *rest])
    if rest:
        found.notes.append(
            f"skipped: {natural_order.format_names(rest)}: they belong to no split (--split all converts them)"
        )
    return chosen


def _select_splits(
    by_split: Mapping[str, list[Path]], root: Path, requested: Sequence[str], found: Found, known: set[str]
) -> list[Path]:
    known.update(by_split)
    names = splits.choose(list(by_split), requested, root)
    found.used += [name for name in names if name not in found.used]
    found.omitted += [name for name in by_split if name not in names and name not in found.omitted]
    return [path for name in names for path in by_split[name]]


def kind_of(path: Path) -> tuple[str | None, str, str]:
    """Format, compression and delimiter by a path's suffixes. The format is None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    rest = suffixes[:-1] if compression else suffixes
    return KINDS.get(rest[-1]) if rest else None, compression, "\t" if rest and rest[-1] in _TABS else ","


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _source(path: Path, split_lines: bool, input_format: str, encoding: str) -> Source:
    try:
        status = os.stat(path)
        kind, compression, delimiter = kind_of(path)
        pipe = (
            stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode) or str(path).startswith(("/dev/", "/proc/"))
        )
        if not pipe and not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: neither a file nor a pipe; pass a file, a folder or a pipe")
        if input_format:
            kind, delimiter = ("csv", "\t") if input_format == "tsv" else (input_format, ",")
        if kind is None:
            advice = "pass its format as --input_format jsonl (or " + ", ".join(FORMATS[1:]) + ")"
            if pipe:
                raise UserError(f"{path}: the format of a pipe is unknown; {advice}")
            raise UserError(
                f"{path}: unknown format; the name must end in {', '.join(KINDS)}, with or without .gz or .zst, or {advice}"
            )
        spool = _spool(path) if pipe else ""
        source = Source(
            path,
            kind,
            compression,
            os.stat(spool or path).st_size,
            delimiter=delimiter,
            identity=_identity(status),
            spool=spool,
        )
        with open(spool or path, "rb") as file:
            head = file.read(1 << 12)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it; change its permissions (chmod, chown)") from error
    if input_format:
        source = dataclasses.replace(
            source, compression=next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")
        )
    if what := _other_format(source, head) or _other_text(source, split_lines, encoding):
        raise UserError(f"{path}: {what}")
    if kind in ("json", "jsonl") and (read_as := _lines_or_array(source)):
        kind = read_as
    return dataclasses.replace(source, kind="lines" if kind == "txt" and split_lines else kind)


_LFS = b"version https://git-lfs.github.com/spec/"
_SIGNATURES = {  # of other formats
    b"\x1f\x8b": "compressed by gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; let its name end in .zst",
    b"BZh91AY&SY": "compressed by bzip2; decompress it with bzip2 -d",
    b"\xfd7zXZ\0": "compressed by xz; decompress it with xz -d",
    b"PAR1": "a parquet file; let its name end in .parquet",
    b"PK\x03\x04": "a zip archive, as .xlsx and .docx files are; extract it, or save the table as csv",
    b"%PDF-": "a PDF; convert it to text, such as with pdftotext",
}


def _other_format(source: Source, head: bytes) -> str:
    """What a file is if it is not what its name says, and what to do; empty otherwise."""
    if source.compression:
        magic = next(magic for magic, name in _MAGIC.items() if name == source.compression)
        return (
            f"not compressed by {source.compression}, as its name says; rename it"
            if head and not head.startswith(magic)
            else ""
        )
    if head.startswith(_LFS):
        return "a Git LFS pointer, not the file itself; run git lfs pull"
    if source.kind not in source_file.TEXT:
        return ""
    return next((what for magic, what in _SIGNATURES.items() if head.startswith(magic)), "")


def _other_text(source: Source, split_lines: bool, encoding: str) -> str:
    """Why a text file would be misread although its bytes are valid UTF-8, and what to do; empty
    otherwise.
    """
    if source.kind not in source_file.TEXT:
        return ""
    head = _head(source)
    if source.kind == "txt" and split_lines and b"\r" in head and b"\n" not in head:
        return "the lines end with a carriage return alone; convert it: tr '\\r' '\\n' < old > new"
    if encoding:
        return ""
    if b"\x1b$B" in head:
        return "not UTF-8: it looks like ISO-2022-JP. Pass --encoding iso2022_jp"
    if len(head) >= 8 and (name := encodings.utf_16_without_mark(head, 0.7)):
        return f"not UTF-8: every other byte is 0; it looks like UTF-16. Pass --encoding {name}"
    return ""


def _head(source: Source) -> bytes:
    """The beginning of a file, decompressed; empty if it is corrupt, which is reported when it is
    read.
    """
    try:
        with open_source(source) as (file, _):
            return file.read(1 << 16)
    except UserError:
        return b""


def _spool(path: Path) -> str:
    """Read a pipe into an unnamed temporary file, which exists as long as this process and its
    children.
    """
    target = os.open(_temporary_folder(), os.O_TMPFILE | os.O_RDWR)
    with disk_errors(_temporary_folder(), "Set TMPDIR to a larger disk"), open(path, "rb", 0) as pipe:
        while block := pipe.read(1 << 20):
            while block:
                block = block[os.write(target, block) :]
    return f"/proc/{os.getpid()}/fd/{target}"


def _temporary_folder() -> str:
    import tempfile

    return tempfile.gettempdir()


def _lines_or_array(source: Source) -> str:
    """Detect jsonl or json by the beginning of a file, because suffixes are often wrong; "" if
    undecided.
    """
    head = _head(source).removeprefix(BOM).lstrip()
    if head[:1] == b"{":
        return "jsonl"
    return "json" if head[:1] == b"[" and not text_readers.is_json_line(head) else ""


def _with_encoding(found: Found, encoding: str) -> list[Source]:
    """The sources with `encoding` set on text files that are not UTF-8. Raises UserError if no
    source is text.
    """
    text = [source for source in found.sources if source.kind in source_file.TEXT]
    if not text:
        raise UserError(f"--encoding {encoding}: parquet and arrow files define their own encoding; omit the flag")
    utf8 = {source.path for source in text if encodings.is_utf8_text(source, encoding)}
    if utf8 and len(utf8) < len(text):
        found.notes.append(
            f"encoding: {len(text) - len(utf8):,} files read as {encoding}, {len(utf8):,} are UTF-8 and read as such"
        )
    elif utf8 and not encodings.same_as_utf8(encoding):
        found.notes.append(f"encoding: the text is UTF-8 and read as such, not as {encoding}")
    return [
        dataclasses.replace(source, encoding=encoding)
        if source.kind in source_file.TEXT and source.path not in utf8
        else source
        for source in found.sources
    ]


def splits_of(found: Found) -> dict[str, Any] | None:
    """The splits as recorded in the manifest."""
    return {"used": found.used, "omitted": found.omitted} if found.used else None
