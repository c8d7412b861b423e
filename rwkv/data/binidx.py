"""The binidx dataset: P.bin holds the tokens, P.idx where each document lies (Megatron's memory-mapped format).

.bin: the tokens, little-endian. .idx, little-endian: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 number of documents n,
u64 n + 1, i32 sizes[n] in tokens, i64 pointers[n] in bytes, i64 document_index[n + 1] = 0 … n.
"""

import contextlib
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkv.errors import UserError
from rwkv.files import abandoned, together

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_LETTERS = {"uint16": "H", "int32": "i"}  # of struct
_BLOCK = 1 << 16  # documents whose entries of the index are made at once


class Writer:
    """Documents to a binidx; made by `writers`."""

    def __init__(self, index: BinaryIO, data: BinaryIO, mask: BinaryIO | None, dtype: str):
        self._index, self._data, self._mask, self.dtype = index, data, mask, np.dtype(dtype)
        self._index.write(bytes(_HEADER.size))
        self.documents = self.tokens = 0

    def add(self, ids: Sequence[int]) -> None:
        """Append one document. Raises UserError if an id does not fit the dtype."""
        try:
            self.add_packed(pack(ids, self.dtype.name), np.array([len(ids)], "<i4").tobytes())
        except ValueError as error:
            raise UserError(f"document {self.documents + 1}: {error}") from error

    def add_packed(self, tokens: bytes, sizes: bytes, mask: bytes = b"") -> None:
        """Append documents: their tokens end to end, as `pack` makes them, the tokens in each as little-endian int32, and the mask."""
        self._data.write(tokens)
        self._index.write(sizes)
        if self._mask:
            self._mask.write(mask)
        self.documents += len(sizes) // 4
        self.tokens += len(tokens) // self.dtype.itemsize

    def add_file(self, prefix: str | Path) -> None:
        """Append all documents of a binidx as it was written here, with its mask."""
        with open(f"{prefix}.idx", "rb") as index:
            _, _, code, count, _ = _HEADER.unpack(index.read(_HEADER.size))
            if code != _CODES[self.dtype]:
                raise UserError(f"{prefix}.idx: is {np.dtype(_DTYPES[code])}, and what it joins is {self.dtype}")
            for begin in range(0, count, _BLOCK):
                self._index.write(index.read(4 * min(_BLOCK, count - begin)))
        for target, path in ((self._data, Path(f"{prefix}.bin")), (self._mask, mask_path(prefix))):
            if target:
                with open(path, "rb") as file:
                    shutil.copyfileobj(file, target, 1 << 20)
        self.documents += count
        self.tokens += Path(f"{prefix}.bin").stat().st_size // self.dtype.itemsize

    def finish(self) -> None:
        """Complete the index, in blocks: memory does not grow with the documents."""
        at = 0
        with open(self._index.name, "rb") as written:
            self._index.flush()
            written.seek(_HEADER.size)
            for begin in range(0, self.documents, _BLOCK):
                sizes = np.frombuffer(written.read(4 * min(_BLOCK, self.documents - begin)), "<i4").astype(np.int64)
                ends = at + np.cumsum(sizes)
                self._index.write((ends - sizes).astype("<i8") * self.dtype.itemsize)
                at = int(ends[-1])
        for begin in range(0, self.documents + 1, _BLOCK):
            self._index.write(np.arange(begin, min(begin + _BLOCK, self.documents + 1), dtype="<i8"))
        self._index.seek(0)
        self._index.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], self.documents, self.documents + 1))


def pack(ids: Sequence[int], dtype: str) -> bytes:
    """Ids as the bytes that .bin holds. Raises ValueError if one does not fit the dtype."""
    try:
        return struct.pack(f"<{len(ids)}{_LETTERS[dtype]}", *ids)
    except struct.error as error:
        wrong = next(i for i in ids if not 0 <= i <= np.iinfo(dtype).max)
        raise ValueError(f"token id {wrong} does not fit {dtype}; use --dtype int32") from error


def document_prefix(output_prefix: str | Path, key: str) -> str:
    """Upstream's name for the pair of files: `P_text_document`."""
    return f"{output_prefix}_{key}_document"


def mask_path(prefix: str | Path) -> Path:
    """Where the loss mask of a binidx lies: `P_<key>_mask.bin` beside `P_<key>_document.bin`, one byte a token, 1 = counts in the loss."""
    return Path(f"{str(prefix).removesuffix('_document')}_mask.bin")


def refuse_existing(prefixes: Sequence[str | Path], mask: bool = False, beside: Sequence[Path] = ()) -> None:
    """Raise UserError if `writers` of the same arguments would replace files.

    Tokens without an index, beside what is left of a run that was killed between the two, are nobody's data and do not count.
    """
    for prefix in prefixes:
        index = Path(f"{prefix}.idx")
        if not index.exists() and abandoned(index):
            continue
        paths = [Path(f"{prefix}.bin"), index, *([mask_path(prefix)] if mask else []), *beside]
        if there := [str(path) for path in paths if path.exists()]:
            raise UserError(f"{' and '.join(there)} exist already; give --force to replace them, or another --output-prefix")


@contextlib.contextmanager
def writers(
    prefixes: Sequence[str | Path], dtype: str = "uint16", mask: bool = False, beside: Sequence[Path] = ()
) -> Iterator[tuple[list[Writer], list[Path]]]:
    """Write several binidx, each with a loss mask if `mask`; all appear when the block ends without an exception, none otherwise.

    The files `beside` appear with them; second in what is yielded are their temporary paths, and one that the block removes is not wanted.
    """
    parts = [Path(f"{prefix}.bin") for prefix in prefixes] + [mask_path(prefix) for prefix in prefixes if mask] + list(beside)
    # The index makes a pair: it never lies beside tokens that it does not describe.
    with together(parts, [Path(f"{prefix}.idx") for prefix in prefixes]) as temporaries, contextlib.ExitStack() as stack:
        open_ = lambda paths: [stack.enter_context(open(path, "wb")) for path in paths]  # noqa: E731
        n = len(prefixes)
        data, masks, indices = open_(temporaries[:n]), open_(temporaries[n : 2 * n]) if mask else [None] * n, open_(temporaries[-n:])
        made = [Writer(*files, dtype) for files in zip(indices, data, masks, strict=True)]
        yield made, temporaries[len(parts) - len(beside) : len(parts)]
        for one in made:
            one.finish()


@contextlib.contextmanager
def writer(prefix: str | Path, dtype: str = "uint16") -> Iterator[Writer]:
    """Write `prefix`.bin and .idx; both appear when the block ends without an exception, neither otherwise."""
    with writers([prefix], dtype) as ([one], _):
        yield one


class Dataset:
    """A binidx opened for reading, memory-mapped.

    Attributes:
        tokens: all documents end to end, [N].
        sizes: tokens of each document, [n].

    Raises:
        UserError: a file is missing, cut short, foreign, or the two do not belong together.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(str(prefix).removesuffix(".bin").removesuffix(".idx"))
        index, data = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        for path in (index, data):
            if not path.is_file():
                raise UserError(f"{path}: no such file. A binidx is two files, .bin and .idx; make them with scripts/convert.py")
        raw = index.read_bytes()
        if raw[:9] != _MAGIC:
            raise UserError(f"{index}: not a binidx index (it does not begin with MMIDIDX); make one with scripts/convert.py")
        if len(raw) < _HEADER.size:
            raise UserError(f"{index}: cut short inside its header ({len(raw)} bytes)")
        _, version, code, count, boundaries = _HEADER.unpack_from(raw)
        if version != 1 or code not in _DTYPES:
            raise UserError(f"{index}: version {version} with dtype code {code}; version 1 with an integer dtype is supported")
        expected = _HEADER.size + 12 * count + 8 * boundaries
        if len(raw) != expected:
            raise UserError(f"{index}: {len(raw)} bytes, and {count} documents need {expected}; it is damaged, convert again")
        dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
        self.sizes = np.frombuffer(raw, "<i4", count, _HEADER.size)
        pointers = np.frombuffer(raw, "<i8", count, _HEADER.size + 4 * count)
        total = int(self.sizes.sum(dtype=np.int64))
        self._starts = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])
        if (self.sizes < 0).any() or (pointers != self._starts[:-1] * dtype.itemsize).any():
            raise UserError(f"{index}: its pointers do not follow from its sizes; it is damaged, convert again")
        if data.stat().st_size != total * dtype.itemsize:
            raise UserError(
                f"{data}: {data.stat().st_size} bytes, and its index speaks of {total} tokens of {dtype.itemsize} bytes"
                f" ({total * dtype.itemsize}); the two do not belong together or one is cut short, convert again"
            )
        if total == 0:
            raise UserError(f"{data}: holds no tokens")
        self.tokens = np.memmap(data, dtype, "r")

    def __len__(self) -> int:
        return len(self.sizes)

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i."""
        return self.tokens[self._starts[i] : self._starts[i + 1]]

    def id_range(self) -> tuple[int, int]:
        """The smallest and the largest token id, by one pass over the file."""
        step = 1 << 24
        ranges = [(int(part.min()), int(part.max())) for part in (self.tokens[i : i + step] for i in range(0, len(self.tokens), step))]
        return min(low for low, _ in ranges), max(high for _, high in ranges)
