"""Read and write checkpoints (.pth, .safetensors) and their manifests; load models.

Files are not trusted: no code in them is executed (rwkv.weights), the error for a file of another
kind says what it is, and missing, unexpected or misshapen keys are reported by name.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv import __version__, compat, mapped_tensors
from rwkv.adapters import lora
from rwkv.errors import UserError
from rwkv.files import atomic_writes, json_text, reserve
from rwkv.formats.lazy import Lazy
from rwkv.kernels import quant
from rwkv.models import RWKV, Sizes, version
from rwkv.models.rwkv import shapes
from rwkv.weights import kinds, pth_writer, reading, safetensors_file
from rwkv.weights import manifest as manifests

PathLike = str | Path
SUFFIXES = (".pth", ".safetensors", ".pt", ".bin", "")
"""File name suffixes of weights; all but .safetensors are written with torch.save."""
MAX_CHECKED = 1 << 14  # tokens on which logits are compared (--check_tokens); their logits take up to 4 GB
_CHUNK = 1 << 20  # elements checked at a time

manifest_path, read_manifest = manifests.path_of, manifests.read
save_safetensors = safetensors_file.save


def read_tensors(path: PathLike) -> dict[str, Tensor]:
    """Read the tensors of a .pth or .safetensors file: on the CPU, in their stored dtypes, under
    BlinkDL's names. They are memory-mapped (rwkv.mapped_tensors).

    Raises:
        UserError: no such file, or not a dictionary of floating-point tensors; the message says
            what it is.
    """
    tensors = reading.tensors_of(path)
    # misaligned tensors are copied
    return {key: value.clone() if value.data_ptr() % value.element_size() else value for key, value in tensors.items()}


def check_output(path: PathLike, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """Check the path of an output file. Raises UserError if its suffix belongs to another format,
    or it is a folder.
    """
    path = Path(path)
    suffix = path.suffix if re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) else ""  # `v1.5` has no suffix
    if suffix not in suffixes:
        known = ", ".join(x for x in suffixes if x)
        raise UserError(
            f"{path}: cannot write {suffix} files; use the suffix {known}" + (", or none" if "" in suffixes else "")
        )
    if os.path.isdir(path):
        raise UserError(f"{path}: a folder; pass a file name")
    return path


def write_tensors(
    path: PathLike,
    tensors: Mapping[str, Tensor] | Mapping[str, Lazy],
    manifest: Mapping[str, Any],
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write tensors to `path` and their manifest to `<path>.json`; if an error occurs, neither.
    Lazy tensors are computed and written one by one.

    Args:
        check: called with the complete temporary file before it is renamed to `path`; if it raises,
            nothing is written.
    """
    path = Path(path)
    lazy = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Lazy)}
    whole = _compact({name: tensor for name, tensor in tensors.items() if not isinstance(tensor, Lazy)})
    del tensors
    stack = {"rwkv-training": __version__, "torch": torch.__version__}
    described = {**manifests.without_absolute_paths(manifest, path), "stack": stack}
    # the manifest as mark: the old one is deleted first and the new one renamed last, so that a
    # manifest never describes other weights
    with atomic_writes([path], [manifest_path(path)]) as (temporary, beside):
        if path.suffix == ".safetensors":
            safetensors_file.save(lazy or whole, temporary)
        elif lazy:
            pth_writer.save(lazy, temporary)
        else:
            save(whole, temporary)
        del whole  # frees copies before the check
        if check:
            check(temporary)
        beside.write_text(json_text(described), encoding="utf-8")


def _compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move tensors to the CPU, and clone those that share a storage or are views of a larger one:
    torch.save writes whole storages, and shared ones once.
    """
    compact, seen = {}, set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = compat.storage(value)
        if storage.nbytes() != value.numel() * value.element_size() or storage.data_ptr() in seen:
            value = value.clone()
        seen.add(storage.data_ptr())
        compact[key] = value
    return compact


def save(value: Any, path: Path) -> None:
    """torch.save to an existing file, with preallocated disk space: torch 1.13.1 crashes the
    process when the disk is full.

    Raises:
        OSError: the disk is full.
    """
    with open(path, "r+b") as file:
        reserve(file, _file_size(value))
        torch.save(value, file)
        file.truncate()


def sizes_of(tensors: Mapping[str, Tensor], path: PathLike) -> Sizes:
    """The model's sizes, from the shapes of its tensors. Raises UserError if these are not a
    supported model.
    """
    if kind := kinds.why_not_model(tensors):
        raise UserError(f"{path}: {kind}")
    try:
        return version.detect({name: tensor.shape for name, tensor in tensors.items()})[1]
    except ValueError as error:
        raise UserError(
            f"{path}: {error}; its tensors are {list_names(sorted(tensors), 3)}; only {kinds.SUPPORTED} are supported"
        ) from None


def check_shapes(tensors: Mapping[str, Tensor] | Mapping[str, Lazy], sizes: Sizes, path: PathLike) -> None:
    """Compare a checkpoint's shapes with those of a model of these sizes, without building it.
    Raises UserError naming the keys that differ.
    """
    check_keys(tensors, shapes(sizes), path)


def check_finite(tensors: Mapping[str, Tensor], path: PathLike, pages: mapped_tensors.Pages | None = None) -> None:
    """Check all tensors for NaN and Inf. Pages of a mapped file (`pages`) are dropped from memory
    after they were read.

    Raises:
        UserError: a tensor contains NaN or Inf; names its key.
    """
    for key, tensor in tensors.items():
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().contiguous().view(-1)
        for chunk in flat.split(_CHUNK):
            # the sum is fast, but may overflow; only then check every element
            if not torch.isfinite(chunk.sum(dtype=torch.float32)) and not torch.isfinite(chunk).all():
                what = "NaN" if torch.isnan(chunk).any() else "Inf"
                raise UserError(
                    f"{path}: {key} contains {what}: its training diverged, or the file is corrupt. Use an earlier checkpoint, or download it again"
                )
            if pages:
                pages.drop(chunk)
    if pages:
        pages.drop_all(tensors.values())


def load_model(
    path: PathLike,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    matrices: torch.dtype | None = None,
    quantise: str | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> RWKV:
    """Load a model from a checkpoint; its sizes are inferred from the shapes.

    Tensors that keep their device and dtype stay memory-mapped; training never writes to them
    (rwkv.mapped_tensors). All others are converted one at a time.

    Args:
        dtype: of all parameters; None: as stored.
        matrices: dtype of matrices, instead of `dtype`.
        quantise: nf4, int8 or fp8: the linear layers of the blocks are frozen and quantised
            (rwkv.kernels.quant), each as it is read, so that the whole model is never in memory.
        tensors: those of `path`, if they were read already; they are removed from the dictionary.

    Raises:
        UserError: not a supported checkpoint; a key is missing, unexpected or misshapen, or
            contains NaN or Inf; names the keys.
    """
    tensors = read_tensors(path) if tensors is None else tensors
    pages, seen = mapped_tensors.Pages(path), set()
    sizes = sizes_of(tensors, path)
    check_shapes(tensors, sizes, path)
    check_finite(tensors, path, pages)
    # on a CPU, memory of parameters that are replaced below would leave holes in the heap
    model = RWKV(sizes, device="meta")
    for name in [name for name, _ in model.named_parameters()]:
        source = tensors.pop(name).detach()
        if quantise and lora.is_quantisable(name, source.shape):
            layer: Any = model.get_submodule(name.removesuffix(".weight"))
            layer.set_quantised(quant.KINDS[quantise](source).to(device))
            pages.drop(source)
            continue
        value = source.to(device, (matrices if lora.is_matrix(name, source.shape) else None) or dtype).contiguous()
        if compat.storage(value).data_ptr() in seen:  # tied in the file; trained separately
            value = value.clone()
        seen.add(compat.storage(value).data_ptr())
        model.set_parameter(name, value)
        if value.data_ptr() != source.data_ptr():
            pages.drop(source)
    return model


def stored_dtypes(path: PathLike) -> dict[str, torch.dtype]:
    """The stored dtype of each tensor in a checkpoint."""
    return {name: tensor.dtype for name, tensor in read_tensors(path).items()}


def fill(model: RWKV, tensors: Mapping[str, Tensor], path: PathLike, partial: bool = False) -> None:
    """Copy a checkpoint's tensors into a model.

    Args:
        partial: leave parameters unchanged that the checkpoint lacks, instead of raising.

    Raises:
        UserError: a key is missing, unexpected or misshapen, or contains NaN or Inf; names the
            keys.
    """
    check_finite(tensors, path)
    copy_tensors(
        model, tensors, {name: p.shape for name, p in model.named_parameters() if name in tensors or not partial}, path
    )


def save_model(
    path: PathLike,
    model: RWKV,
    manifest: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a model's weights under upstream's names, without LoRA tensors.

    Args:
        weights: tensors to write instead of the model's parameters, e.g. gathered from shards.
        check: as in write_tensors.
    """
    tensors = weights or {name: parameter for name, parameter in model.named_parameters() if ".lora_" not in name}
    write_tensors(path, tensors, {"kind": "model", **describe(model), **manifest}, check)


def describe(model: RWKV) -> dict[str, Any]:
    """Manifest entries that describe a model: its version and sizes."""
    return {"version": model.version.NAME, "sizes": vars(model.sizes)}


def copy_tensors(model: RWKV, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: PathLike) -> None:
    """Copy tensors into the parameters named in `shapes`. Raises UserError like check_keys."""
    check_keys(tensors, shapes, path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in tensors.items():
            parameters[key].copy_(value)


def check_keys(
    tensors: Mapping[str, Tensor] | Mapping[str, Lazy], shapes: Mapping[str, torch.Size], path: PathLike
) -> None:
    """Raise UserError unless the tensors have exactly these names and shapes."""
    missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    misshapen = [
        f"{key} {list(tensors[key].shape)}, expected {list(shapes[key])}"
        for key in sorted(shapes.keys() & tensors.keys())
        if tensors[key].shape != shapes[key]
    ]
    errors = [
        f"{kind}: {list_names(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if keys
    ]
    if errors:
        raise UserError(
            f"{path}: keys do not match the model. " + "; ".join(errors) + ". Use a complete checkpoint of one model"
        )


def _file_size(value: Any) -> int:
    """Upper bound of the size in bytes of a file written by torch.save."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() + 1024  # name, header and alignment
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass")) + 64
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return 1024 + sum(map(_file_size, items)) if items else 64


def list_names(keys: Sequence[str], most: int = 5) -> str:
    """Format the first `most` keys for a message, with the number of others."""
    shown = ", ".join(key[:200] for key in keys[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")
