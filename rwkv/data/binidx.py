"""Read and write binidx datasets (Megatron's memory-mapped format): tokens in P.bin, document
boundaries in P.idx.

.bin: the tokens, little-endian. .idx, little-endian: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code,
u64 number of documents n, u64 n + 1, i32 sizes[n] in tokens, i64 pointers[n] in bytes, i64
document_index[n + 1] = 0 … n. P_mask.bin (P without its suffix `_document`): the loss mask, one
byte per token; 1 contributes to the loss. Without it all tokens do. P.json: the manifest
(rwkv.data.provenance); files of other programs have none.
"""

import bisect
import contextlib
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rwkv import files
from rwkv.errors import UserError
from rwkv.files import atomic_writes, stale_temporaries

MANIFEST = "rwkv binidx"  # marks the manifest of a binidx (rwkv.data.provenance)
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_FLOATS = {6: "float32", 7: "float64"}
_CHUNK = 1 << 20  # index entries validated at a time
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_STRUCT_CODES = {"uint16": "H", "int32": "i"}
_BLOCK = 1 << 16  # index entries written at a time
_MAX_DOCUMENT = 1 << 30  # tokens per document of add_stream: sizes in the index are 32-bit


class Writer:
    """Append documents to a binidx; created by `writers`."""

    def __init__(self, index: BinaryIO, data: BinaryIO, mask: BinaryIO | None, manifest: Path, dtype: str):
        self._index, self._data, self._mask, self.dtype = index, data, mask, np.dtype(dtype)
        self._index.write(bytes(_HEADER.size))
        self.documents = self.tokens = 0
        self._counted = 0
        # where to write P.json; if nothing is written, an existing P.json is removed
        self.manifest = manifest

    @property
    def counted(self) -> int | None:
        """Tokens that contribute to the loss; None without a mask."""
        return self._counted if self._mask else None

    def add(self, ids: Sequence[int]) -> None:
        """Append one document. Raises UserError if an id does not fit the dtype."""
        try:
            self.add_packed(pack(ids, self.dtype.name), np.array([len(ids)], "<i4").tobytes())
        except ValueError as error:
            raise UserError(f"document {self.documents + 1}: {error}") from error

    def add_stream(self, blocks: Iterable[np.ndarray]) -> None:
        """Append blocks of ids, each 1-D, as one document (split every 2³⁰ tokens).

        Raises:
            UserError: an id does not fit the dtype.
        """
        limits, length = np.iinfo(self.dtype), 0
        for block in blocks:
            if len(block) and not limits.min <= block.min() <= block.max() <= limits.max:
                raise UserError(f"token id {block.min() if block.min() < 0 else block.max()} does not fit {self.dtype}")
            for part in np.split(block, range(_MAX_DOCUMENT - length, len(block), _MAX_DOCUMENT)):
                self.add_packed(part.astype(self.dtype).tobytes(), b"")
                length += len(part)
                if length == _MAX_DOCUMENT:
                    self.add_packed(b"", np.array([length], "<i4").tobytes())
                    length = 0
        if length:
            self.add_packed(b"", np.array([length], "<i4").tobytes())

    def add_packed(self, tokens: bytes, sizes: bytes, mask: bytes = b"") -> None:
        """Append documents.

        Args:
            tokens: the concatenated tokens, as `pack` returns them.
            sizes: number of tokens per document, little-endian int32.
            mask: one byte per token.
        """
        self._data.write(tokens)
        self._index.write(sizes)
        if self._mask:
            self._mask.write(mask)
            self._counted += mask.count(1)
        self.documents += len(sizes) // 4
        self.tokens += len(tokens) // self.dtype.itemsize

    def add_file(self, prefix: str | Path) -> None:
        """Append all documents of another binidx written by this module, with its mask."""
        with open(f"{prefix}.idx", "rb") as index:
            _, _, code, count, _ = _HEADER.unpack(index.read(_HEADER.size))
            if code != _CODES[self.dtype]:
                raise UserError(
                    f"{prefix}.idx: has dtype {np.dtype(_DTYPES[code])}, but the output has {self.dtype}; convert it again with the same --dtype"
                )
            for begin in range(0, count, _BLOCK):
                self._index.write(index.read(4 * min(_BLOCK, count - begin)))
        for target, path in ((self._data, Path(f"{prefix}.bin")), (self._mask, mask_path(prefix))):
            if target:
                with open(path, "rb") as file:
                    while block := file.read(1 << 22):
                        target.write(block)
                        self._counted += block.count(1) if target is self._mask else 0
        self.documents += count
        self.tokens += Path(f"{prefix}.bin").stat().st_size // self.dtype.itemsize

    def finish(self) -> None:
        """Write the rest of the index, in blocks of constant size (bounded memory)."""
        at = 0
        with open(self._index.name, "rb") as written:
            self._index.flush()
            written.seek(_HEADER.size)
            for begin in range(0, self.documents, _BLOCK):
                sizes = np.frombuffer(written.read(4 * min(_BLOCK, self.documents - begin)), "<i4").astype(np.int64)
                ends = at + np.cumsum(sizes)
                self._index.write(((ends - sizes).astype("<i8") * self.dtype.itemsize).data)
                at = int(ends[-1])
        for begin in range(0, self.documents + 1, _BLOCK):
            self._index.write(np.arange(begin, min(begin + _BLOCK, self.documents + 1), dtype="<i8").data)
        self._index.seek(0)
        self._index.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], self.documents, self.documents + 1))


def pack(ids: Sequence[int], dtype: str) -> bytes:
    """Encode ids as bytes of the .bin file. Raises ValueError if one does not fit the dtype."""
    try:
        return struct.pack(f"<{len(ids)}{_STRUCT_CODES[dtype]}", *ids)
    except struct.error as error:
        wrong = next(i for i in ids if not 0 <= i <= np.iinfo(dtype).max)
        raise ValueError(f"token id {wrong} does not fit {dtype}; use --dtype int32") from error


def document_prefix(output_prefix: str | Path, key: str) -> str:
    """The prefix of a binidx under upstream's naming: `P_text_document`."""
    return f"{output_prefix}_{key}_document"


def mask_path(prefix: str | Path) -> Path:
    """Path of a binidx's loss mask: `P_<key>_mask.bin` beside `P_<key>_document.bin`."""
    return Path(f"{str(prefix).removesuffix('_document')}_mask.bin")


def index_path(prefix: str | Path) -> Path:
    """Path of a binidx's index; the prefix may end in .bin or .idx."""
    return Path(f"{str(prefix).removesuffix('.bin').removesuffix('.idx')}.idx")


@contextlib.contextmanager
def exclusive(output_prefix: str | Path, prefixes: Sequence[str | Path]) -> Iterator[None]:
    """Lock these binidx files and the output prefix against writes by other processes while the
    block runs.

    Raises:
        UserError: another process is writing one of them.
    """
    with contextlib.ExitStack() as stack:
        for prefix in dict.fromkeys(map(Path, [output_prefix, *prefixes])):
            stack.enter_context(
                files.exclusive(prefix.with_name(f".{prefix.name}.lock"), prefix, "choose another --output-prefix")
            )
        yield


def reject_existing(prefixes: Sequence[str | Path], beside: Sequence[Path] = ()) -> None:
    """Raise UserError if `writers` with the same arguments would replace files.

    A .bin without an .idx, next to leftovers of an interrupted conversion, is ignored.
    """
    for prefix in prefixes:
        index = Path(f"{prefix}.idx")
        if not index.exists() and stale_temporaries(index):
            continue
        manifest = Path(f"{prefix}.json")
        paths = [
            Path(f"{prefix}.bin"),
            index,
            mask_path(prefix),
            *beside,
            *([] if _is_manifest(manifest) else [manifest]),
        ]
        if existing := [str(path) for path in paths if path.exists()]:
            raise UserError(
                f"{' and '.join(existing)} already exist; pass --force to replace them, or another --output-prefix"
            )


def _is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of a binidx, which may be replaced when its data is missing."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return MANIFEST.encode() in file.read(100)
    return False


@contextlib.contextmanager
def writers(
    prefixes: Sequence[str | Path], dtype: str = "uint16", mask: bool = False, beside: Sequence[Path] = ()
) -> Iterator[tuple[list[Writer], list[Path]]]:
    """Write several binidx atomically, each with a loss mask if `mask`. All files appear if the
    block succeeds, none otherwise.

    Tokens, mask, manifest and index are one set: a mask or manifest of an earlier conversion is
    removed if this one writes none.

    Args:
        beside: further files to write with them, also atomically.

    Yields:
        The writers, and the temporary paths of `beside`; the block deletes those that it does not
        write.
    """
    n = len(prefixes)
    parts = [Path(f"{prefix}.bin") for prefix in prefixes] + [mask_path(prefix) for prefix in prefixes]
    parts += [*(Path(f"{prefix}.json") for prefix in prefixes), *beside]
    # The index is removed first and renamed last, so that it never describes the tokens of another
    # conversion.
    with (
        atomic_writes(parts, [Path(f"{prefix}.idx") for prefix in prefixes]) as temporaries,
        contextlib.ExitStack() as stack,
    ):
        masks, manifests = temporaries[n : 2 * n], temporaries[2 * n : 3 * n]
        for unwanted in [*manifests, *([] if mask else masks)]:
            unwanted.unlink()

        def open_all(paths: Sequence[Path]) -> list[BinaryIO]:
            return [stack.enter_context(open(path, "wb")) for path in paths]

        parts_of_each = zip(
            open_all(temporaries[-n:]),
            open_all(temporaries[:n]),
            open_all(masks) if mask else [None] * n,
            manifests,
            strict=True,
        )
        opened = [Writer(*handles, dtype) for handles in parts_of_each]
        yield opened, temporaries[3 * n : len(parts)]
        for output in opened:
            output.finish()


@contextlib.contextmanager
def writer(prefix: str | Path, dtype: str = "uint16") -> Iterator[Writer]:
    """Write `prefix`.bin and .idx atomically."""
    with writers([prefix], dtype) as ([one], _):
        yield one


class Dataset:
    """A binidx opened for reading. Tokens, mask and index are memory-mapped, not read into memory.

    Attributes:
        tokens: [N], all documents concatenated, in the dtype given in the index.
        mask: uint8 [N], 1 where a token contributes to the loss; None: all do.
        sizes: int32 [n], tokens per document.

    Raises:
        UserError: a file is missing, truncated, of another format, or does not match the others.
    """

    def __init__(self, prefix: str | Path):
        index = index_path(prefix)
        self.prefix = index.with_name(index.name.removesuffix(".idx"))
        data = Path(f"{self.prefix}.bin")
        for path in (index, data):
            if not path.is_file():
                raise UserError(
                    f"{path}: no such file. A binidx consists of two files, .bin and .idx; create them with scripts/convert.py"
                )
        dtype, self.sizes, self._pointers = _read_index(index)
        self._width = dtype.itemsize
        self._total = int(self._pointers[-1]) // self._width + int(self.sizes[-1]) if len(self.sizes) else 0
        if data.stat().st_size != self._total * self._width:
            raise UserError(
                f"{data}: {data.stat().st_size} bytes, but its index describes {self._total} tokens of {self._width} bytes"
                f" ({self._total * self._width}); the files do not match or one is truncated: convert again"
            )
        if self._total == 0:
            raise UserError(f"{data}: contains no tokens; convert again from a source with text")
        self.tokens = np.memmap(data, dtype, "r")
        self.mask = self._open_mask()
        mapped: list[tuple[Path, Any]] = [(data, self.tokens), (index, self.sizes), (mask_path(self.prefix), self.mask)]
        self._mapped = [(path, array._mmap, array._mmap.size()) for path, array in mapped if array is not None]

    def _open_mask(self) -> np.ndarray | None:
        path = mask_path(self.prefix)
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            raise UserError(
                f"{path}: not a file, or a link to a file that does not exist; restore the loss mask, or remove it to train on all tokens"
            )
        if path.stat().st_size != self._total:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes, but {self.prefix}.bin has {self._total} tokens; a mask has one byte per token."
                " The files do not match or one is truncated: convert again, or remove the mask to train on all tokens"
            )
        return np.memmap(path, np.uint8, "r")

    def __len__(self) -> int:
        return len(self.sizes)

    def span(self, i: int) -> tuple[int, int]:
        """Begin and end of document i in `tokens`."""
        begin = int(self._pointers[i]) // self._width
        return begin, begin + int(self.sizes[i])

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i."""
        begin, end = self.span(i)
        return self.tokens[begin:end]

    def starts(self, begin: int, end: int) -> np.ndarray:
        """Starts of the documents in tokens[begin:end], ascending, int64. Empty documents repeat a
        start.
        """
        # np.searchsorted would copy the index, which is not aligned in the file.
        low, high = (bisect.bisect_left(self._pointers, at * self._width) for at in (begin, end))
        return self._pointers[low:high] // self._width

    def check_sizes(self) -> None:
        """Check that no file was truncated since it was opened; called before reading. (An access
        beyond the end of a mapped file kills the process.)

        Raises:
            UserError: a file was truncated.
        """
        for path, file, size in self._mapped:
            if file.size() < size:  # of the mapped file, also if it was replaced by another one
                raise UserError(
                    f"{path}: was truncated while in use, from {size} to {file.size()} bytes; restore it and run again"
                )

    def id_range(self) -> tuple[int, int]:
        """The smallest and largest token id; reads the whole file."""
        step, ranges = 1 << 24, []
        for i in range(0, len(self.tokens), step):
            self.check_sizes()
            part = self.tokens[i : i + step]
            ranges.append((int(part.min()), int(part.max())))
            self.release()
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def release(self) -> None:
        """Drop the mapped pages read so far; they are read again on access."""
        mapped: Any  # numpy's stubs do not know _mmap
        for mapped in (self.tokens, self.mask):
            if mapped is not None:
                mapped._mmap.madvise(mmap.MADV_DONTNEED)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """dtype of the tokens, and the memory-mapped size (tokens) and pointer (bytes) of every
    document, validated.
    """
    length = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    if head[:9] != _MAGIC:
        raise UserError(
            f"{path}: not a binidx index (it does not begin with MMIDIDX); create one with scripts/convert.py"
        )
    if len(head) < _HEADER.size:
        raise UserError(f"{path}: truncated inside its header ({length} bytes); convert again")
    _, version, code, count, boundaries = _HEADER.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{path}: version {version} with dtype code {code}{f' ({_FLOATS[code]})' if code in _FLOATS else ''};"
            " version 1 with an integer dtype is supported, convert again"
        )
    expected = _HEADER.size + 12 * count + 8 * boundaries
    if length != expected:
        raise UserError(f"{path}: {length} bytes, but {count} documents need {expected}; it is corrupt, convert again")
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    raw = np.memmap(path, np.uint8, "r") if count else np.zeros(_HEADER.size, np.uint8)
    sizes = raw[_HEADER.size :][: 4 * count].view("<i4")
    pointers = raw[_HEADER.size + 4 * count :][: 8 * count].view("<i8")
    document_index = raw[_HEADER.size + 12 * count :].view("<i8")
    _check_sizes(path, sizes, pointers, dtype.itemsize)
    if count and not _is_range(document_index, count):
        raise UserError(
            f"{path}: its document index is not 0 … {count}, one entry per document; documents of several sequences are not supported,"
            " convert again"
        )
    return dtype, sizes, pointers


def _check_sizes(path: Path, sizes: np.ndarray, pointers: np.ndarray, width: int) -> None:
    end = 0
    for i in range(0, len(sizes), _CHUNK):
        part = sizes[i : i + _CHUNK].astype(np.int64)
        ends = end + np.cumsum(part) * width
        wrong = np.flatnonzero((part < 0) | (pointers[i : i + _CHUNK] != ends - part * width))
        if len(wrong):
            first = int(wrong[0])
            raise UserError(
                f"{path}: its pointers do not match its sizes: document {i + first + 1} has size {part[first]} and pointer"
                f" {pointers[i + first]}, expected {(ends - part * width)[first]}; it is corrupt, convert again"
            )
        end = int(ends[-1])


def _is_range(values: np.ndarray, count: int) -> bool:
    """Whether the values are 0, 1, …, count."""
    chunks = range(0, len(values), _CHUNK)
    return len(values) == count + 1 and all(
        (part == np.arange(i, i + len(part))).all() for i in chunks for part in [values[i : i + _CHUNK]]
    )
