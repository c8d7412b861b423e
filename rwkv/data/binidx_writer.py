"""Write one or several binidx datasets (the format is described in rwkv.data.binidx) atomically."""

import contextlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkv import locks
from rwkv.data.binidx import DTYPES, HEADER, MAGIC, MANIFEST, mask_path
from rwkv.errors import UserError
from rwkv.files import atomic_writes, stale_temporaries

_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
_STRUCT_CODES = {"uint16": "H", "int32": "i"}
_BLOCK = 1 << 16  # index entries written at a time
_MAX_DOCUMENT = 1 << 30  # tokens per document of add_stream: sizes in the index are 32-bit


class Writer:
    """Append documents to a binidx; created by `writers`."""

    def __init__(self, index: BinaryIO, data: BinaryIO, mask: BinaryIO | None, manifest: Path, dtype: str):
        self._index, self._data, self._mask, self.dtype = index, data, mask, np.dtype(dtype)
        self._index.write(bytes(HEADER.size))
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
                raise UserError(
                    f"token id {block.min() if block.min() < 0 else block.max()} does not fit {self.dtype}; token ids must be from 0 to"
                    f" {limits.max}: convert again with the model's tokenizer"
                )
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
            _, _, code, count, _ = HEADER.unpack(index.read(HEADER.size))
            if code != _CODES[self.dtype]:
                raise UserError(
                    f"{prefix}.idx: has dtype {np.dtype(DTYPES[code])}, but the output has {self.dtype}; convert it again with the same --dtype"
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
            written.seek(HEADER.size)
            for begin in range(0, self.documents, _BLOCK):
                sizes = np.frombuffer(written.read(4 * min(_BLOCK, self.documents - begin)), "<i4").astype(np.int64)
                ends = at + np.cumsum(sizes)
                self._index.write(((ends - sizes).astype("<i8") * self.dtype.itemsize).data)
                at = int(ends[-1])
        for begin in range(0, self.documents + 1, _BLOCK):
            self._index.write(np.arange(begin, min(begin + _BLOCK, self.documents + 1), dtype="<i8").data)
        self._index.seek(0)
        self._index.write(HEADER.pack(MAGIC, 1, _CODES[self.dtype], self.documents, self.documents + 1))


def pack(ids: Sequence[int], dtype: str) -> bytes:
    """Encode ids as bytes of the .bin file. Raises ValueError if one does not fit the dtype."""
    try:
        return struct.pack(f"<{len(ids)}{_STRUCT_CODES[dtype]}", *ids)
    except struct.error as error:
        wrong = next(i for i in ids if not 0 <= i <= np.iinfo(dtype).max)
        raise ValueError(f"token id {wrong} does not fit {dtype}; use --dtype int32") from error


@contextlib.contextmanager
def exclusive(output_prefix: str | Path, prefixes: Sequence[str | Path]) -> Iterator[None]:
    """Lock these binidx files and the output prefix against writes by other processes while the
    block runs.

    Raises:
        UserError: another process is writing one of them, or the output prefix names no file.
    """
    if not Path(output_prefix).name:
        raise UserError(
            f"--output-prefix {output_prefix}: not the beginning of a file name; pass one, such as out/mine"
        )
    with contextlib.ExitStack() as stack:
        for prefix in dict.fromkeys(map(Path, [output_prefix, *prefixes])):
            stack.enter_context(
                locks.exclusive(prefix.with_name(f".{prefix.name}.lock"), prefix, "choose another --output-prefix")
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
