"""Export a model, or a base with its adapter, to a format of other programs, and verify what was
written.

A file is written tensor by tensor from the mapped checkpoint (rwkv.formats.lazy). It is then read
back under BlinkDL's names, and compared with the original: every weight, and logits on random
tokens.
"""

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv import adapter_files, checkpoint, mapped_tensors
from rwkv.errors import UserError
from rwkv.files import atomic_write
from rwkv.formats import gguf, gguf_file, rwkv_cpp, web_rwkv
from rwkv.formats.lazy import Lazy, parts
from rwkv.models import RWKV, version
from rwkv.models.rwkv import shapes, unused
from rwkv.weights import safetensors_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUFFIXES = {".pth": "pth", ".safetensors": "safetensors", ".gguf": "gguf", ".st": "st", ".bin": "rwkv.cpp"}
_CAN_HOLD = {
    "gguf": ("fp32", "fp16", "bf16", "q8_0"),
    "st": ("fp16",),
    "rwkv.cpp": ("fp16", "fp32"),
}  # other formats: DTYPES
# formats with a place for a tuned state, and for which versions
_WITH_STATE = {"pth": version.VERSIONS, "safetensors": version.VERSIONS, "st": web_rwkv.WITH_STATE}
_NOT_READ = ("4", "7")  # versions whose tuned state PyPI's rwkv does not read from a .pth
_MAX_20B = range(50254, 50433)  # vocabulary sizes of models with the 20B tokenizer, with padding


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        path: the checkpoint.
        tensors: its tensors under BlinkDL's names, with the adapter merged into them in fp32.
        stored: the dtype of each in the checkpoint.
        sizes: the model's sizes.
        adapter: path of the adapter, or empty.
        alpha: lora_alpha of an adapter without manifest.
        state: path of a tuned state, or empty.
    """

    path: Path
    tensors: Mapping[str, Lazy]
    stored: Mapping[str, torch.dtype]
    sizes: Any
    adapter: str = ""
    alpha: float | None = None
    state: str = ""

    @property
    def version(self) -> str:
        """Name of the RWKV version."""
        return version.version_of(self.sizes).NAME

    @property
    def label(self) -> str:
        """The model, for messages."""
        return " + ".join(filter(None, (str(self.path), self.adapter, self.state)))

    def cast(self, dtype: str) -> dict[str, Lazy]:
        """The tensors in a dtype: fp32, bf16, fp16; keep: as stored. A value that overflows raises
        UserError when it is computed.
        """
        return {
            name: tensor.cast(self.stored.get(name, torch.float32) if dtype == "keep" else DTYPES[dtype], name)
            for name, tensor in self.tensors.items()
        }

    def load(self) -> RWKV:
        """The model, with the adapter unmerged. Matrices stay mapped in their dtype, and are
        computed with in fp32.
        """
        matrices = self.stored["emb.weight"]
        if self.adapter:
            model = adapter_files.load_tuned(self.path, self.adapter, self.alpha, matrices)[0]
        else:
            model = checkpoint.load_model(self.path, matrices=matrices)
        if self.state:
            adapter_files.attach_state(self.state, model, self.path)
        return model


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        dtypes: of the tensors in the file.
        weights: largest absolute difference of a weight in the file from the original's.
        logits: largest absolute difference of a logit; None: not compared.
        largest: the largest absolute logit of the original; None: not compared.
    """

    dtypes: list[str]
    weights: float
    logits: float | None = None
    largest: float | None = None


def open_source(path: str | Path, adapter: str = "", alpha: float | None = None, state: str = "") -> Source:
    """Open a checkpoint file or folder (`checkpoint.read_tensors`), and an adapter and a tuned
    state for it.

    Raises:
        UserError: not a model or adapter that fit each other, or with NaN or Inf.
    """
    path = Path(path)
    found = checkpoint.read_tensors(path)
    pages = mapped_tensors.Pages(path)
    sizes: Any = checkpoint.sizes_of(found, path)
    checkpoint.check_shapes(found, sizes, path)
    checkpoint.check_finite(found, path, pages)
    stored = {name: tensor.dtype for name, tensor in found.items()}
    tensors = {name: Lazy.of(tensor, _dropping(pages, tensor)) for name, tensor in found.items()}
    if adapter:
        tensors = adapter_files.merged(tensors, path, adapter, alpha)
    if state:
        adapter_files.check_is_state(state)
        if adapter:
            adapter_files.check_one_state(adapter, state)
        tensors = adapter_files.merged(tensors, path, state)
    if any(name.endswith(".att.time_state") for name in tensors):
        sizes = replace(sizes, time_state=True)
    ordered = {name: tensors[name] for name in shapes(sizes)}
    return Source(path, ordered, stored, sizes, adapter, alpha, state)


def _dropping(pages: mapped_tensors.Pages, tensor: Tensor) -> Callable[[], None]:
    return lambda: pages.drop(tensor)


def format_of(output: str | Path) -> str:
    """The format that an output's name selects: by its suffix; folder: `folder`."""
    output = str(output)
    suffix = Path(output).suffix
    if output.endswith("/") or os.path.isdir(output) or not re.fullmatch(r"\.[A-Za-z]\w*", suffix):
        return "folder"  # `v1.5` has no suffix
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UserError(
            f"{output}: the suffix {suffix} selects no format; use {known}, or none for a folder, or pass --format"
        )
    return SUFFIXES[suffix]


def check_state(kind: str, source: Source) -> None:
    """Raise UserError if the model begins with a tuned state that a format cannot store."""
    possible = [name for name, versions in _WITH_STATE.items() if source.version in versions]
    if source.sizes.time_state and kind not in possible:
        what = f"{kind} of RWKV-{source.version}" if kind in _WITH_STATE else kind
        raise UserError(
            f"{source.label}: begins with a tuned state (att.time_state), which {what} cannot store; use --format"
            f" {', '.join(possible)}, or scripts/serve.py, whose API other programs can use"
        )


def state_note(kind: str, source: Source) -> str:
    """A warning about a written file with a tuned state that another program would ignore; or
    empty.
    """
    if kind != "pth" or not source.sizes.time_state or source.version not in _NOT_READ:
        return ""
    return (
        f"PyPI's rwkv does not read the tuned state of an RWKV-{source.version} model from the file; pass it as a state"
        " (docs/state-tuning.md, File format)"
    )


def dtype_in(kind: str, dtype: str, source: Source) -> str:
    """The dtype of matrices in a file of a format, for --dtype. Raises UserError if the format
    cannot hold it.
    """
    possible = _CAN_HOLD.get(kind, tuple(DTYPES))
    if dtype == "keep" and kind not in _CAN_HOLD:
        return dtype
    if dtype == "keep":
        names = {known: name for name, known in DTYPES.items()}
        stored = names.get(source.stored["emb.weight"], "fp32")
        return stored if stored in possible else possible[0]
    if dtype not in possible:
        raise UserError(f"--dtype {dtype}: {kind} files cannot hold it; use {', '.join(possible)}, or keep")
    return dtype


def export_file(
    source: Source, output: Path, kind: str, dtype: str, tokens: int, origin: Mapping[str, Any]
) -> Exported:
    """Write one file, and verify it.

    Args:
        kind: pth, safetensors, gguf, st or rwkv.cpp.
        dtype: of matrices, from `dtype_in`.
        tokens: number of random tokens on which logits are compared; 0: only weights.
        origin: for the manifest of .pth and .safetensors files.

    Raises:
        UserError: the format cannot hold the model, a value overflows, or a logit is NaN or Inf;
            nothing is written.
    """
    found: list[Exported] = []
    vocabulary = _vocabulary_for_gguf(source) if kind == "gguf" else []
    expected = logits_of(source.load(), tokens) if tokens else None

    def verify(file: Path, read: Callable[[Path], Mapping[str, Tensor | Lazy]], dtypes: list[str]) -> None:
        found.append(compare(source, read(file), expected, dtypes, file))

    if kind in ("pth", "safetensors"):
        tensors = source.cast(dtype)
        dtypes = short_dtypes(tensors.values())
        manifest = {"kind": "model", "version": source.version, "sizes": vars(source.sizes), **origin}
        checkpoint.write_tensors(output, tensors, manifest, lambda file: verify(file, checkpoint.read_tensors, dtypes))
        return found[0]
    with atomic_write(output) as temporary:
        if kind == "gguf":
            tensors = gguf.convert(source.tensors)
            gguf.write(temporary, tensors, source.version, source.sizes, dtype, output.stem, vocabulary)
            dtypes = sorted({gguf.type_of(key, lazy.shape, dtype) for key, lazy in tensors.items()})
            verify(temporary, lambda file: gguf.restore(gguf_file.read(file), shapes(source.sizes)), dtypes)
        elif kind == "st":
            tensors = web_rwkv.convert(source.cast("fp16"))
            safetensors_file.save(tensors, temporary)
            dtypes = short_dtypes(tensors.values())
            verify(temporary, lambda file: web_rwkv.restore(checkpoint.read_tensors(file)), dtypes)
        else:
            tensors = rwkv_cpp.convert(source.tensors, source.version, DTYPES[dtype])
            rwkv_cpp.write(temporary, tensors, source.sizes.n_layer, DTYPES[dtype])
            dtypes = short_dtypes(tensors.values())
            verify(temporary, lambda file: rwkv_cpp.restore(rwkv_cpp.read(file), source.version), dtypes)
    return found[0]


def _vocabulary_for_gguf(source: Source) -> list[bytes]:
    if source.version not in gguf.VERSIONS:
        raise UserError(
            f"{source.path}: an RWKV-{source.version} model; llama.cpp has only RWKV-{' and '.join(gguf.VERSIONS)}. Export to .pth or .bin (rwkv.cpp)"
        )
    return world_tokens(source)


def world_tokens(source: Source) -> list[bytes]:
    """The bytes of the World vocabulary's tokens by id, as far as the model has them.

    Raises:
        UserError: the model has another tokenizer.
    """
    from rwkv.data import tokenizer

    known = checkpoint.read_manifest(source.path).get("tokenizer") if source.path.is_file() else None
    name = known.get("name") if isinstance(known, dict) else known
    if name not in (None, tokenizer.WorldTokenizer.name) or (name is None and source.sizes.vocab_size in _MAX_20B):
        raise UserError(
            f"{source.path}: its tokenizer is {name or '20B (by the size of its vocabulary)'}, but only the World vocabulary can be written; export"
            " to .pth or .safetensors"
        )
    return tokenizer.world_vocabulary()[: source.sizes.vocab_size]


def short_dtypes(tensors: Any) -> list[str]:
    """The names of the tensors' dtypes."""
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def compare(
    source: Source, written: Mapping[str, Tensor | Lazy], expected: Tensor | None, dtypes: list[str], path: Path
) -> Exported:
    """Compare the tensors of a written file, under BlinkDL's names, with the source.

    Args:
        expected: the source's logits (`logits_of`); None: compare only weights.
        path: the file or folder, which is mapped.

    Raises:
        UserError: a tensor is missing or misshapen, or a weight or logit is NaN or Inf.
    """
    found = {name: tensor if isinstance(tensor, Lazy) else Lazy.of(tensor) for name, tensor in written.items()}
    checkpoint.check_shapes(found, source.sizes, "the exported file")
    difference, pages = 0.0, mapped_tensors.Pages(path)
    for name in source.tensors.keys() - unused(source.sizes):  # formats may leave these out
        ours, theirs = source.tensors[name].make(), found[name].make()
        for mine, other in zip(parts(ours), parts(theirs), strict=True):
            difference = max(difference, float((mine.float() - other.float()).abs().max()))
        source.tensors[name].release()
        pages.drop(theirs)
    if expected is None:
        return Exported(dtypes, difference)
    whole = {name: tensor.make() for name, tensor in found.items()}
    model = checkpoint.load_model(path, matrices=whole["emb.weight"].dtype, tensors=whole)
    return compare_logits(dtypes, difference, expected, logits_of(model, len(expected)))


def compare_logits(dtypes: list[str], weights: float, expected: Tensor, theirs: Tensor) -> Exported:
    """The result for logits of the original and of the exported model. Raises UserError if one is
    NaN or Inf.
    """
    difference, largest = float((theirs - expected).abs().max()), float(expected.abs().max())
    if not math.isfinite(difference) or not math.isfinite(largest):
        raise UserError(
            "the logits of the original or the exported model are NaN or Inf, so the export cannot be verified; nothing is written."
            " Use --dtype bf16 or fp32; if that does not help, its training diverged: use an earlier checkpoint"
        )
    return Exported(dtypes, weights, difference, largest)


def random_tokens(sizes: Any, count: int) -> Tensor:
    """[1, count] random token ids, the same in every call."""
    return torch.randint(sizes.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits_of(model: RWKV, count: int) -> Tensor:
    """[count, V] logits in fp32 on random tokens."""
    return model.eval()(random_tokens(model.sizes, count))[0][0]


@contextlib.contextmanager
def as_folder(files: Mapping[str, Path]) -> Iterator[Path]:
    """A temporary folder with links of these names to files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            (Path(folder) / name).symlink_to(path.resolve())
        yield Path(folder)
