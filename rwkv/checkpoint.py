"""Read and write checkpoints (.pth, .safetensors) and their manifests; load models and LoRA
adapters.

Files are not trusted: no code in them is executed (rwkv.weights), other kinds of files are reported
as what they are, and missing, unexpected or misshapen keys are reported by name.
"""

import math
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
from rwkv.files import atomic_write, reserve, sha256, write_json
from rwkv.models import RWKV, Sizes, version
from rwkv.models.rwkv import shapes
from rwkv.weights import kinds, peft_adapter, reading, safetensors_file
from rwkv.weights import manifest as manifests

PathLike = str | Path
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


ENDINGS = (".pth", ".safetensors", ".pt", ".bin", "")
"""File name suffixes of weights; all but .safetensors are written with torch.save."""


def check_output(path: PathLike, endings: Sequence[str] = ENDINGS) -> Path:
    """Check the path of an output file. Raises UserError if its suffix belongs to another format,
    or it is a folder.
    """
    path = Path(path)
    ending = path.suffix if re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) else ""  # `v1.5` has no suffix
    if ending not in endings:
        known = ", ".join(x for x in endings if x)
        raise UserError(
            f"{path}: cannot write {ending} files; use the suffix {known}" + (", or none" * ("" in endings))
        )
    if os.path.isdir(path):
        raise UserError(f"{path}: a folder; give a file name")
    return path


def write_tensors(
    path: PathLike,
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write tensors to `path` and their manifest to `<path>.json`; each file atomically.

    Args:
        check: called with the complete temporary file before it is renamed to `path`; if it raises,
            nothing is written.
    """
    path = Path(path)
    tensors = _compact(tensors)
    stack = {"rwkv-training": __version__, "torch": torch.__version__}
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            safetensors_file.save(tensors, temporary)
        else:
            save(tensors, temporary)
        del tensors  # frees copies before the check
        if check:
            check(temporary)
        # delete the old manifest first and write the new one last, so that a manifest never
        # describes other weights
        manifest_path(path).unlink(missing_ok=True)
    write_json(manifest_path(path), {**manifests.without_absolute_paths(manifest, path), "stack": stack})


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
    if kind := kinds.other_than_model(tensors):
        raise UserError(f"{path}: {kind}")
    try:
        return version.detect({name: tensor.shape for name, tensor in tensors.items()})[1]
    except ValueError as error:
        raise UserError(f"{path}: {error}; its tensors are {_some(sorted(tensors), 3)}") from None


def check_shapes(tensors: Mapping[str, Tensor], sizes: Sizes, path: PathLike) -> None:
    """Compare a checkpoint's shapes with those of a model of these sizes, without building it.
    Raises UserError naming the keys that differ.
    """
    _check_keys(tensors, shapes(sizes), path)


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
) -> RWKV:
    """Load a model from a checkpoint; its sizes are inferred from the shapes.

    Tensors that keep their device and dtype stay memory-mapped; training never writes to them
    (rwkv.mapped_tensors). All others are converted one at a time.

    Args:
        dtype: of all parameters; None: as stored.
        matrices: dtype of matrices, instead of `dtype`.

    Raises:
        UserError: not a supported checkpoint; a key is missing, unexpected or misshapen, or
            contains NaN or Inf; names the keys.
    """
    tensors = read_tensors(path)
    pages, seen = mapped_tensors.Pages(path), set()
    sizes = sizes_of(tensors, path)
    check_shapes(tensors, sizes, path)
    check_finite(tensors, path, pages)
    model = RWKV(sizes)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        source = tensors.pop(name).detach()
        value = source.to(device, (matrices if lora.is_matrix(source) else None) or dtype).contiguous()
        if compat.storage(value).data_ptr() in seen:  # tied in the file; train separately
            value = value.clone()
        seen.add(compat.storage(value).data_ptr())
        parameter.data = value
        if value.data_ptr() != source.data_ptr():
            pages.drop(source)
    return model


def _dtypes(path: PathLike) -> dict[str, torch.dtype]:
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
    _fill(
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


def save_adapter(
    path: PathLike,
    model: RWKV,
    adapter: Mapping[str, Any],
    manifest: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write only the adapter.

    Args:
        adapter: for the manifest: r, alpha, parts, base, base_sha256.
        weights: as in save_model.
    """
    tensors = lora.adapter_state(model, adapter["parts"]) if weights is None else weights
    write_tensors(path, tensors, {"kind": "adapter", **describe(model), **adapter, **manifest})


def describe(model: RWKV) -> dict[str, Any]:
    """Manifest entries of every file of a model: its version and sizes."""
    return {"version": model.version.NAME, "sizes": vars(model.sizes)}


def adapter_manifest(path: PathLike) -> dict[str, Any]:
    """An adapter's manifest: `<path>.json`, or for peft r and alpha from adapter_config.json; empty
    if there is neither.

    Raises:
        UserError: a value in it is invalid.
    """
    parts = version.DEFAULT.PARTS.names
    if config := peft_adapter.config_of(Path(path)):
        return manifests.check_adapter(peft_adapter.described(config), config, parts)
    return manifests.check_adapter(manifests.read(path), manifests.path_of(path), parts)


def find_base(path: PathLike) -> Path | None:
    """The base model named in an adapter's manifest; None if there is none or it is not found
    (`rwkv.weights.manifest.find_base`).
    """
    return manifests.find_base(adapter_manifest(path), path)


def inspect_adapter(
    path: PathLike, base: PathLike | None = None, alpha: float | None = None, base_sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter without loading its base: its tensors, and a dictionary of r, parts, alpha,
    base, base_sha256.

    r and parts are inferred from the tensors (r from the manifest if no tensor has it); alpha, base
    and base_sha256 come from the manifest, else from the arguments.

    Args:
        path: the adapter; also a folder written by peft, or the file in it.
        base: the base model; its hash must be that in the manifest.
        alpha: required if the manifest has none; otherwise it must be the same.
        base_sha256: the hash of `base`, if known.

    Raises:
        UserError: not an adapter; it contains NaN or Inf; it belongs to another base; alpha is
            unknown or differs from the manifest.
    """
    tensors = read_tensors(peft_adapter.file_of(Path(path)))
    if kind := kinds.other_than_adapter(tensors):
        raise UserError(f"{path}: {kind}")
    manifest = adapter_manifest(path)
    ranks = {value.shape[0] if value.dim() else 0 for key, value in tensors.items() if key.endswith(".lora_A")}
    of_version = version.VERSIONS[manifest.get("version", version.DEFAULT.NAME)].PARTS
    foreign, parts = lora.foreign_layers(tensors, of_version), lora.parts_of(tensors, of_version)
    if foreign:
        raise UserError(
            f"{path}: adapts {_some(foreign)}, but only {', '.join(of_version.layers)} can have adapters here; merge it with the"
            " program that wrote it, and use the merged model"
        )
    if len(ranks) > 1:
        raise UserError(
            f"{path}: its layers have different ranks ({', '.join(map(str, sorted(ranks)))}); only a single rank is supported"
        )
    if not parts:
        raise UserError(f"{path}: not a LoRA adapter (its tensors are {_some(sorted(tensors), 3)})")
    check_finite(tensors, path)
    known: dict[str, Any] = {
        "r": ranks.pop() if ranks else manifest.get("r", 1),
        "parts": parts,
        **{k: manifest[k] for k in ("alpha", "base", "base_sha256") if k in manifest},
    }
    if known["r"] < 1 or known["r"] != manifest.get("r", known["r"]):
        raise UserError(
            f"{path}: rank {known['r']}, but {manifests.path_of(path).name} says {manifest.get('r')}; that manifest belongs to another file"
        )
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"{path}: alpha {alpha}: must be a positive number, the one that the adapter was trained with")
    if alpha is not None and known.setdefault("alpha", alpha) != alpha:
        raise UserError(
            f"{path}: trained with alpha {known['alpha']:g}, not {alpha:g}; omit alpha, or give {known['alpha']:g}"
        )
    if "alpha" not in known:
        raise UserError(
            f"{path}: its alpha is unknown (no {manifests.path_of(path).name} with alpha beside it); give the one it was trained with as --lora_alpha"
        )
    if base is not None:
        if not os.path.isfile(base):
            raise UserError(f"{base}: no such base model (of adapter {path}); give the file it was trained on")
        known["base"], expected = str(base), known.get("base_sha256")
        known["base_sha256"] = base_sha256 or sha256(base)
        if expected and known["base_sha256"] != expected.lower():
            raise UserError(
                f"{path}: adapter of another base: trained on {manifest.get('base')} (SHA-256 {expected[:12]}…), but {base} has"
                f" {str(known['base_sha256'])[:12]}…; give the base it was trained on"
            )
    return tensors, known


def load_adapter(model: RWKV, path: PathLike, tensors: Mapping[str, Tensor], parts: list[str]) -> None:
    """Copy an adapter's tensors into a model prepared by lora.inject. Raises UserError naming keys
    that do not fit.
    """
    shapes = {name: dict(model.named_parameters())[name].shape for name in lora.adapter_names(model, parts)}
    _fill(model, tensors, shapes, path)


def load_tuned(
    base: PathLike, adapter: PathLike, alpha: float | None = None, matrices: torch.dtype | None = None
) -> tuple[RWKV, dict[str, torch.dtype]]:
    """Load a base model in fp32 with its adapter, unmerged; returns the model and the base's stored
    dtypes.

    Args:
        matrices: dtype of matrices, instead of fp32.

    Raises UserError as load_model and inspect_adapter do.
    """
    tensors, known = inspect_adapter(adapter, base, alpha)
    model = load_model(base, matrices=matrices)
    lora.inject(model, known["parts"], known["r"], known["alpha"])
    load_adapter(model, adapter, tensors, known["parts"])
    return model, _dtypes(base)


def load_combined(
    base: PathLike, adapters: Sequence[PathLike], weights: Sequence[float], alpha: float | None = None
) -> tuple[RWKV, dict[str, torch.dtype]]:
    """As load_tuned, with a weighted sum of several adapters of one base (lora.combine).

    Raises UserError as load_model and inspect_adapter do.
    """
    found, parts, r = [], set(), 0
    for path, weight in zip(adapters, weights, strict=True):  # fails early if the base is wrong
        tensors, known = inspect_adapter(path, base, alpha)
        found.append((tensors, known["alpha"] / known["r"], weight))
        parts |= set(known["parts"])
        r += known["r"]
    model = load_model(base)
    for (tensors, _, _), path in zip(found, adapters, strict=True):
        _check_adapter_keys(model, tensors, path)
    combined = lora.combine(found, dict(model.named_parameters()))
    lora.inject(model, parts, r, r)
    load_adapter(model, " + ".join(map(str, adapters)), combined, list(parts))
    return model, _dtypes(base)


def _check_adapter_keys(model: RWKV, tensors: Mapping[str, Tensor], path: PathLike) -> None:
    """Compare an adapter's shapes with the model's layers. Raises UserError naming keys that do not
    fit.
    """
    parameters = dict(model.named_parameters())
    shapes: dict[str, torch.Size] = {}
    for key, value in tensors.items():
        name, adapts, half = key.rpartition(".lora_")
        weight = parameters.get(f"{name}.weight" if adapts else key)
        if weight is not None and adapts:
            r = value.shape[0 if half == "A" else -1] if value.dim() else 0
            shapes[key] = torch.Size([r, weight.shape[1]] if half == "A" else [weight.shape[0], r])
        elif weight is not None:
            shapes[key] = weight.shape
    absent = {
        f"{key[:-1]}{other}" for key in tensors if key.endswith((".lora_A", ".lora_B")) for other in "AB"
    } - tensors.keys()
    _check_keys(tensors, {**shapes, **{key: torch.Size() for key in absent}}, path)


def _fill(model: RWKV, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: PathLike) -> None:
    """Copy tensors into parameters; raises UserError unless the keys are exactly those of
    `shapes`.
    """
    _check_keys(tensors, shapes, path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in tensors.items():
            parameters[key].copy_(value)


def _check_keys(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: PathLike) -> None:
    """Raises UserError unless the tensors have exactly these names and shapes."""
    missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    misshapen = [
        f"{key} {list(tensors[key].shape)}, expected {list(shapes[key])}"
        for key in sorted(shapes.keys() & tensors.keys())
        if tensors[key].shape != shapes[key]
    ]
    errors = [
        f"{kind}: {_some(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if keys
    ]
    if errors:
        raise UserError(f"{path}: keys do not match the model. " + "; ".join(errors))


def _file_size(value: Any) -> int:
    """Upper bound of the size in bytes of a file written by torch.save."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() + 1024  # name, header and alignment
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return 1024 + sum(map(_file_size, inside)) if inside else 64


def _some(keys: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(key[:200] for key in keys[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")
