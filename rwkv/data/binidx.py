"""Read binidx datasets (Megatron's memory-mapped format): tokens in P.bin, document
boundaries in P.idx.

.bin: the tokens, little-endian. .idx, little-endian: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code,
u64 number of documents n, u64 n + 1, i32 sizes[n] in tokens, i64 pointers[n] in bytes, i64
document_index[n + 1] = 0 … n. P_mask.bin (P without its suffix `_document`): the loss mask, one
byte per token; 1 contributes to the loss. Without it all tokens do. P.json: the manifest
(rwkv.data.provenance); files of other programs have none. Written by rwkv.data.binidx_writer.
"""

import bisect
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from rwkv.errors import UserError

MANIFEST = "rwkv binidx"  # marks the manifest of a binidx (rwkv.data.provenance)
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_FLOATS = {6: "float32", 7: "float64"}
_CHUNK = 1 << 20  # index entries validated at a time


def document_prefix(output_prefix: str | Path, key: str) -> str:
    """The prefix of a binidx under upstream's naming: `P_text_document`."""
    return f"{output_prefix}_{key}_document"


def mask_path(prefix: str | Path) -> Path:
    """Path of a binidx's loss mask: `P_<key>_mask.bin` beside `P_<key>_document.bin`."""
    return Path(f"{str(prefix).removesuffix('_document')}_mask.bin")


def index_path(prefix: str | Path) -> Path:
    """Path of a binidx's index; the prefix may end in .bin or .idx."""
    return Path(f"{str(prefix).removesuffix('.bin').removesuffix('.idx')}.idx")


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
        if index.name.removesuffix(".idx") in ("", ".", ".."):
            raise UserError(f"{prefix}: not the prefix of a binidx; pass P for P.bin and P.idx")
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
        head = file.read(HEADER.size)
    if head[:9] != MAGIC:
        raise UserError(
            f"{path}: not a binidx index (it does not begin with MMIDIDX); create one with scripts/convert.py"
        )
    if len(head) < HEADER.size:
        raise UserError(f"{path}: truncated inside its header ({length} bytes); convert again")
    _, version, code, count, boundaries = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise UserError(
            f"{path}: version {version} with dtype code {code}{f' ({_FLOATS[code]})' if code in _FLOATS else ''};"
            " version 1 with an integer dtype is supported, convert again"
        )
    expected = HEADER.size + 12 * count + 8 * boundaries
    if length != expected:
        raise UserError(f"{path}: {length} bytes, but {count} documents need {expected}; it is corrupt, convert again")
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    raw = np.memmap(path, np.uint8, "r") if count else np.zeros(HEADER.size, np.uint8)
    sizes = raw[HEADER.size :][: 4 * count].view("<i4")
    pointers = raw[HEADER.size + 4 * count :][: 8 * count].view("<i8")
    document_index = raw[HEADER.size + 12 * count :].view("<i8")
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
