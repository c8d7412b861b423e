"""Upstream's data types that have no documents: character-level text (utf-8, utf-16le, dummy) and
arrays of ids (numpy).
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rwkv.data import binidx_writer, provenance
from rwkv.data.convert.source_file import Source
from rwkv.errors import UserError
from rwkv.files import write_json

TEXTS = ("utf-8", "utf-16le", "dummy")
_BLOCK = 1 << 20  # characters or ids processed at a time


def vocabulary(kind: str, path: str) -> str:
    """The distinct characters of a text, sorted; the i-th is token i. Raises UserError if the file
    cannot be read.
    """
    found: set[str] = set()
    for block in _text(kind, path):
        found.update(block)
    return "".join(sorted(found))


def characters_to_binidx(kind: str, path: str, prefix: str, vocabulary_file: Path) -> None:
    """Write the characters of a text as a binidx, and {id: character} as JSON. Raises UserError as
    vocabulary.
    """
    known = vocabulary(kind, path)
    if not known:
        raise UserError(f"{path}: the file is empty; use a file with text")
    if vocabulary_file.exists() and not _is_vocabulary(vocabulary_file):
        raise UserError(
            f"{vocabulary_file}: this run would overwrite it, but it is not a vocabulary of characters; move it away, or choose another --proj_dir"
        )
    write_json(vocabulary_file, dict(enumerate(known)))
    codes = _codes(known)
    with binidx_writer.writer(prefix, _dtype(len(known))) as out:
        out.add_stream(np.searchsorted(codes, _codes(block)) for block in _text(kind, path))
        tokenizer = {"name": "characters", "vocab_size": len(known), "eod": None, "sha256": None}
        _describe(out, tokenizer, path if kind != "dummy" else "", kind)


def _is_vocabulary(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and all(isinstance(x, str) and len(x) == 1 for x in found.values())


def array_to_binidx(path: str, prefix: str) -> None:
    """Write the ids of a .npy file, a 1-D integer array, as a binidx. Raises UserError if it
    contains anything else.
    """
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a .npy file of numbers ({error}); write the token ids with numpy.save") from error
    if not isinstance(ids, np.ndarray):
        names = ", ".join(ids.files[:5])
        ids.close()
        raise UserError(
            f"{path}: an .npz archive (containing {names or 'nothing'}) despite its name; save the array of ids alone with numpy.save"
        )
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or not len(ids):
        raise UserError(f"{path}: an array of {ids.dtype} {list(ids.shape)}; token ids must be a 1-D array of integers")
    blocks = [slice(begin, begin + _BLOCK) for begin in range(0, len(ids), _BLOCK)]
    with binidx_writer.writer(prefix, _dtype(1 + max(int(ids[block].max()) for block in blocks))) as out:
        out.add_stream(np.array(ids[block]) for block in blocks)
        _describe(out, None, path, "numpy")


def _describe(out: binidx_writer.Writer, tokenizer: dict | None, path: str, kind: str) -> None:
    stat = Path(path).stat() if path else None
    sources = (
        [
            Source(
                Path(path), kind, "", stat.st_size, identity=(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            )
        ]
        if stat
        else []
    )
    described = provenance.describe(tokenizer, sources, {"data_type": kind})
    provenance.write(out.manifest, described, out.documents, out.tokens, out.counted)


def _text(kind: str, path: str) -> Iterator[str]:
    if kind == "dummy":  # short, correct sums, which even a tiny model can learn
        for i in range(100_000):
            a, b = i % 10_000, i * i % 10_000
            yield f".{a}+{b}={a + b}."
        return
    try:
        with open(path, encoding=kind) as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not {kind} ({error}); set --data_type to its encoding, or convert it with scripts/convert.py"
        ) from error


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "int32"
