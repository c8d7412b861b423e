"""The binidx dataset: P.bin holds the tokens, P.idx where each document lies (Megatron's memory-mapped format).

.bin: the tokens, little-endian. .idx, little-endian: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 number of documents n,
u64 n + 1, i32 sizes[n] in tokens, i64 pointers[n] in bytes, i64 document_index[n + 1] = 0 … n.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rwkv.errors import UserError
from rwkv.files import whole

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


class Writer:
    """Documents to a binidx; made by `writer`."""

    def __init__(self, file, dtype: np.dtype):
        self._file, self._dtype, self._limit = file, dtype, np.iinfo(dtype).max
        self.sizes: list[int] = []
        self.tokens = 0

    def add(self, ids: list[int]) -> None:
        """Append one document. Raises UserError if an id does not fit the dtype."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() <= self._limit:
            raise UserError(f"document {len(self.sizes) + 1}: token id {array.max()} does not fit {self._dtype}; use --dtype int32")
        self._file.write(array.astype(self._dtype.newbyteorder("<")).tobytes())
        self.sizes.append(array.size)
        self.tokens += array.size


@contextlib.contextmanager
def writer(prefix: str | Path, dtype: str = "uint16") -> Iterator[Writer]:
    """Write `prefix`.bin and .idx; both appear when the block ends without an exception, neither otherwise."""
    kind = np.dtype(dtype)
    with whole(f"{prefix}.idx") as index, whole(f"{prefix}.bin") as data:
        with open(data, "wb") as file:
            target = Writer(file, kind)
            yield target
            file.flush()
            os.fsync(file.fileno())
        index.write_bytes(_index(np.asarray(target.sizes, dtype=np.int64), kind))
        # An index never lies beside tokens it does not describe: the old one goes first, the new one comes last.
        Path(f"{prefix}.idx").unlink(missing_ok=True)


def _index(sizes: np.ndarray, dtype: np.dtype) -> bytes:
    count = len(sizes)
    pointers = np.concatenate([[0], np.cumsum(sizes)[:-1]]) * dtype.itemsize if count else np.zeros(0)
    head = _HEADER.pack(_MAGIC, 1, _CODES[dtype], count, count + 1)
    return head + sizes.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + np.arange(count + 1, dtype="<i8").tobytes()


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
