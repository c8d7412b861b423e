"""The binidx dataset: P.bin holds the tokens, P.idx where each document lies (Megatron's memory-mapped format).

.bin: the tokens, little-endian. .idx, little-endian: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype code, u64 number of documents n,
u64 n + 1, i32 sizes[n] in tokens, i64 pointers[n] in bytes, i64 document_index[n + 1] = 0 … n.
P_mask.bin, where P is without `_document`: a loss mask, one byte per token in the order of the .bin; 1 contributes to the loss. Without it all do.
P.json: what it was made from (rwkv.data.provenance); files of other programs have none.
"""

import bisect
import contextlib
import mmap
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rwkv import files
from rwkv.errors import UserError
from rwkv.files import abandoned, together

MANIFEST = "rwkv binidx"  # marks the manifest of a binidx (rwkv.data.provenance)
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_FLOATS = {6: "float32", 7: "float64"}
_CHUNK = 1 << 20  # entries of an index that are looked at at once
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_LETTERS = {"uint16": "H", "int32": "i"}  # of struct
_BLOCK = 1 << 16  # documents whose entries of the index are made at once
_LONGEST = 1 << 30  # tokens of a document that comes as a stream: the index counts them in 32 bits


class Writer:
    """Documents to a binidx; made by `writers`."""

    def __init__(self, index: BinaryIO, data: BinaryIO, mask: BinaryIO | None, manifest: Path, dtype: str):
        self._index, self._data, self._mask, self.dtype = index, data, mask, np.dtype(dtype)
        self._index.write(bytes(_HEADER.size))
        self.documents = self.tokens = 0
        self._counted = 0
        self.manifest = manifest  # write P.json here; without it an old one is removed

    @property
    def counted(self) -> int | None:
        """Tokens that contribute to the loss; None: there is no mask."""
        return self._counted if self._mask else None

    def add(self, ids: Sequence[int]) -> None:
        """Append one document. Raises UserError if an id does not fit the dtype."""
        try:
            self.add_packed(pack(ids, self.dtype.name), np.array([len(ids)], "<i4").tobytes())
        except ValueError as error:
            raise UserError(f"document {self.documents + 1}: {error}") from error

    def add_stream(self, blocks: Iterable[np.ndarray]) -> None:
        """Append ids that come in blocks, each a row of integers, as one document (several of 2³⁰ tokens if it is longer). Raises UserError as add."""
        limits, length = np.iinfo(self.dtype), 0
        for block in blocks:
            if len(block) and not limits.min <= block.min() <= block.max() <= limits.max:
                raise UserError(f"token id {block.min() if block.min() < 0 else block.max()} does not fit {self.dtype}")
            for part in np.split(block, range(_LONGEST - length, len(block), _LONGEST)):
                self.add_packed(part.astype(self.dtype).tobytes(), b"")
                length += len(part)
                if length == _LONGEST:
                    self.add_packed(b"", np.array([length], "<i4").tobytes())
                    length = 0
        if length:
            self.add_packed(b"", np.array([length], "<i4").tobytes())

    def add_packed(self, tokens: bytes, sizes: bytes, mask: bytes = b"") -> None:
        """Append documents: their tokens end to end, as `pack` makes them, the tokens in each as little-endian int32, and the mask."""
        self._data.write(tokens)
        self._index.write(sizes)
        if self._mask:
            self._mask.write(mask)
            self._counted += mask.count(1)
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
                    while block := file.read(1 << 22):
                        target.write(block)
                        self._counted += block.count(1) if target is self._mask else 0
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
                self._index.write(((ends - sizes).astype("<i8") * self.dtype.itemsize).data)
                at = int(ends[-1])
        for begin in range(0, self.documents + 1, _BLOCK):
            self._index.write(np.arange(begin, min(begin + _BLOCK, self.documents + 1), dtype="<i8").data)
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


@contextlib.contextmanager
def exclusive(output_prefix: str | Path, prefixes: Sequence[str | Path]) -> Iterator[None]:
    """Keep other processes from writing these binidx, or others under the same output prefix, as long as the block runs.

    Raises:
        UserError: another process is writing one of them.
    """
    with contextlib.ExitStack() as stack:
        for prefix in dict.fromkeys(map(Path, [output_prefix, *prefixes])):
            stack.enter_context(
                files.exclusive(prefix.with_name(f".{prefix.name}.lock"), prefix, "choose another --output-prefix")
            )
        yield


def refuse_existing(prefixes: Sequence[str | Path], beside: Sequence[Path] = ()) -> None:
    """Raise UserError if `writers` of the same arguments would replace files.

    Tokens without an index, beside what is left of a run that was killed between the two, are nobody's data and do not count.
    """
    for prefix in prefixes:
        index = Path(f"{prefix}.idx")
        if not index.exists() and abandoned(index):
            continue
        manifest = Path(f"{prefix}.json")
        paths = [
            Path(f"{prefix}.bin"),
            index,
            mask_path(prefix),
            *beside,
            *([] if _is_manifest(manifest) else [manifest]),
        ]
        if there := [str(path) for path in paths if path.exists()]:
            raise UserError(
                f"{' and '.join(there)} exist already; give --force to replace them, or another --output-prefix"
            )


def _is_manifest(path: Path) -> bool:
    """Whether a file is a manifest of ours, which is of no use without its data."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return MANIFEST.encode() in file.read(100)
    return False


@contextlib.contextmanager
def writers(
    prefixes: Sequence[str | Path], dtype: str = "uint16", mask: bool = False, beside: Sequence[Path] = ()
) -> Iterator[tuple[list[Writer], list[Path]]]:
    """Write several binidx, each with a loss mask if `mask`; all appear when the block ends without an exception, none otherwise.

    Tokens, mask, manifest and index are one set: a mask or manifest of an earlier conversion that this one does not write is removed.
    The files `beside` appear with them; second in what is yielded are their temporary paths, and one that the block removes is not wanted.
    """
    n = len(prefixes)
    parts = [Path(f"{prefix}.bin") for prefix in prefixes] + [mask_path(prefix) for prefix in prefixes]
    parts += [*(Path(f"{prefix}.json") for prefix in prefixes), *beside]
    # The index makes a pair: it is never beside tokens that it does not describe.
    with (
        together(parts, [Path(f"{prefix}.idx") for prefix in prefixes]) as temporaries,
        contextlib.ExitStack() as stack,
    ):
        masks, manifests = temporaries[n : 2 * n], temporaries[2 * n : 3 * n]
        for unwanted in [*manifests, *([] if mask else masks)]:
            unwanted.unlink()
        open_ = lambda paths: [stack.enter_context(open(path, "wb")) for path in paths]  # noqa: E731
        files = zip(
            open_(temporaries[-n:]),
            open_(temporaries[:n]),
            open_(masks) if mask else [None] * n,
            manifests,
            strict=True,
        )
        made = [Writer(*some, dtype) for some in files]
        yield made, temporaries[3 * n : len(parts)]
        for one in made:
            one.finish()


@contextlib.contextmanager
def writer(prefix: str | Path, dtype: str = "uint16") -> Iterator[Writer]:
    """Write `prefix`.bin and .idx; both appear when the block ends without an exception, neither otherwise."""
    with writers([prefix], dtype) as ([one], _):
        yield one


class Dataset:
    """A binidx opened for reading. Tokens, mask and index are memory-mapped: opening one takes no memory that grows with it.

    Attributes:
        tokens: all documents end to end, [N], of the dtype that the index names.
        mask: uint8 [N], 1 where a token counts in the loss; None: all count.
        sizes: tokens of each document, [n].

    Raises:
        UserError: a file is missing, truncated, of another format, or they do not belong together.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(str(prefix).removesuffix(".bin").removesuffix(".idx"))
        index, data = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        for path in (index, data):
            if not path.is_file():
                raise UserError(
                    f"{path}: no such file. A binidx is two files, .bin and .idx; make them with scripts/convert.py"
                )
        dtype, self.sizes, self._pointers = _read_index(index)
        self._width = dtype.itemsize
        self._total = int(self._pointers[-1]) // self._width + int(self.sizes[-1]) if len(self.sizes) else 0
        if data.stat().st_size != self._total * self._width:
            raise UserError(
                f"{data}: {data.stat().st_size} bytes, and its index speaks of {self._total} tokens of {self._width} bytes"
                f" ({self._total * self._width}); the two do not belong together or one is truncated, convert again"
            )
        if self._total == 0:
            raise UserError(f"{data}: holds no tokens")
        self.tokens = np.memmap(data, dtype, "r")
        self.mask = self._open_mask()

    def _open_mask(self) -> np.ndarray | None:
        path = mask_path(self.prefix)
        if not path.exists():
            return None
        if path.stat().st_size != self._total:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes, and {self.prefix}.bin holds {self._total} tokens; a mask has one byte per token."
                " The two do not belong together or one is truncated: convert again, or move the mask away to let every token count"
            )
        return np.memmap(path, np.uint8, "r")

    def __len__(self) -> int:
        return len(self.sizes)

    def span(self, i: int) -> tuple[int, int]:
        """Where document i begins and ends in `tokens`."""
        begin = int(self._pointers[i]) // self._width
        return begin, begin + int(self.sizes[i])

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i."""
        begin, end = self.span(i)
        return self.tokens[begin:end]

    def starts(self, begin: int, end: int) -> np.ndarray:
        """Where documents start in tokens[begin:end], ascending, int64; of empty documents and the one after them, several are equal."""
        # not numpy's searchsorted: it would copy the whole index first, which is not aligned in its file
        low, high = (bisect.bisect_left(self._pointers, at * self._width) for at in (begin, end))
        return self._pointers[low:high] // self._width

    def id_range(self) -> tuple[int, int]:
        """The smallest and the largest token id, by one pass over the file."""
        step, ranges = 1 << 24, []
        for i in range(0, len(self.tokens), step):
            part = self.tokens[i : i + step]
            ranges.append((int(part.min()), int(part.max())))
            self.release()
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def release(self) -> None:
        """Give back the memory of what was read so far; it is read again when it is asked for again."""
        mapped: Any  # numpy's stubs do not know _mmap
        for mapped in (self.tokens, self.mask):
            if mapped is not None:
                mapped._mmap.madvise(mmap.MADV_DONTNEED)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """dtype of the tokens, and size (tokens) and pointer (bytes) of every document, memory-mapped and checked against each other."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    if head[:9] != _MAGIC:
        raise UserError(
            f"{path}: not a binidx index (it does not begin with MMIDIDX); make one with scripts/convert.py"
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
        raise UserError(f"{path}: {length} bytes, and {count} documents need {expected}; it is damaged, convert again")
    dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
    raw = np.memmap(path, np.uint8, "r") if count else np.zeros(_HEADER.size, np.uint8)
    sizes = raw[_HEADER.size :][: 4 * count].view("<i4")
    pointers = raw[_HEADER.size + 4 * count :][: 8 * count].view("<i8")
    numbers = raw[_HEADER.size + 12 * count :].view("<i8")
    _check_sizes(path, sizes, pointers, dtype.itemsize)
    if count and not _counts_up(numbers, count):
        raise UserError(
            f"{path}: its document index is not 0 … {count}, one entry per document; files whose documents have several parts are not read,"
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
                f"{path}: its pointers do not follow from its sizes: document {i + first + 1} has size {part[first]} and pointer"
                f" {pointers[i + first]}, and {(ends - part * width)[first]} was expected; it is damaged, convert again"
            )
        end = int(ends[-1])


def _counts_up(numbers: np.ndarray, count: int) -> bool:
    chunks = range(0, len(numbers), _CHUNK)
    return len(numbers) == count + 1 and all(
        (part == np.arange(i, i + len(part))).all() for i in chunks for part in [numbers[i : i + _CHUNK]]
    )
