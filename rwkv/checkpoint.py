"""Checkpoints: read and write .pth and .safetensors, take the sizes from the shapes, keep a manifest beside the weights.

A file is never trusted to be what its name says: nothing in it is executed (rwkv.weights), what it is instead of a checkpoint is said, and a missing,
surplus or misshapen key is refused by its name.
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
from rwkv.files import reserve, sha256, whole, write_json
from rwkv.models import RWKV, Sizes, version
from rwkv.models.rwkv import shapes
from rwkv.weights import kinds, peft_adapter, reading, safetensors_file
from rwkv.weights import manifest as manifests

PathLike = str | Path
_CHUNK = 1 << 20  # numbers looked at together

manifest_path, read_manifest = manifests.path_of, manifests.read
save_safetensors = safetensors_file.save


def read_tensors(path: PathLike) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, on the CPU, in the dtypes they were stored in, under BlinkDL's names. They stay in the file, mapped
    (rwkv.mapped_tensors). Nothing in the file is executed (rwkv.weights).

    Raises:
        UserError: no such file, or not a dictionary of floating-point tensors; the message says what it is.
    """
    tensors = reading.tensors_of(path)
    # Those that begin in their file where no number of their dtype may are copied.
    return {key: value.clone() if value.data_ptr() % value.element_size() else value for key, value in tensors.items()}


ENDINGS = (".pth", ".safetensors", ".pt", ".bin", "")
"""What a file of weights may be called; .safetensors is written as such, all others as torch.save does."""


def check_output(path: PathLike, endings: Sequence[str] = ENDINGS) -> Path:
    """The path of a file of weights to be written. Raises UserError if its ending promises another format than it would have, or the path is a folder."""
    path = Path(path)
    ending = path.suffix if re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) else ""  # v1.5 ends in no ending
    if ending not in endings:
        known = ", ".join(x for x in endings if x)
        raise UserError(
            f"{path}: files that end in {ending} are not written; end the name in {known}"
            + (", or in nothing" * ("" in endings))
        )
    if os.path.isdir(path):
        raise UserError(f"{path}: a folder; give the name of a file")
    return path


def write_tensors(
    path: PathLike,
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write the tensors and, beside them, `<path>.json`; each atomically.

    Args:
        check: is called with the complete temporary file before it gets its name; if it raises, nothing is written.
    """
    path = Path(path)
    tensors = _compact(tensors)
    stack = {"rwkv-training": __version__, "torch": torch.__version__}
    with whole(path) as temporary:
        if path.suffix == ".safetensors":
            safetensors_file.save(tensors, temporary)
        else:
            save(tensors, temporary)
        del tensors  # their memory, if nobody else has them
        if check:
            check(temporary)
        # A manifest is never beside weights that it does not describe: the old one is deleted first, the new one written last.
        manifest_path(path).unlink(missing_ok=True)
    write_json(manifest_path(path), {**manifests.without_absolute_paths(manifest, path), "stack": stack})


def _compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each with memory of its own and no more than it needs: a file holds all of it, and once what is shared. Copied only where it must be."""
    made, taken = {}, set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        memory = compat.storage(value)
        if memory.nbytes() != value.numel() * value.element_size() or memory.data_ptr() in taken:
            value = value.clone()
        taken.add(memory.data_ptr())
        made[key] = value
    return made


def save(value: Any, path: Path) -> None:
    """torch.save into a file that exists, its room set aside first: where the disk fills up, torch 1.13.1 takes the whole process down.

    Raises:
        OSError: there is no room.
    """
    with open(path, "r+b") as file:
        reserve(file, _bytes(value))
        torch.save(value, file)
        file.truncate()


def sizes_of(tensors: Mapping[str, Tensor], path: PathLike) -> Sizes:
    """The model's sizes from its tensors' shapes. Raises UserError that says what it is instead, if it is no model that can be used."""
    if kind := kinds.other_than_model(tensors):
        raise UserError(f"{path}: {kind}")
    try:
        return version.detect({name: tensor.shape for name, tensor in tensors.items()})[1]
    except ValueError as error:
        raise UserError(f"{path}: {error}; its tensors are {_some(sorted(tensors), 3)}") from None


def check_shapes(tensors: Mapping[str, Tensor], sizes: Sizes, path: PathLike) -> None:
    """Compare a checkpoint with the model of these sizes, without building it. Raises UserError naming keys that do not fit."""
    _check_keys(tensors, shapes(sizes), path)


def check_finite(tensors: Mapping[str, Tensor], path: PathLike, pages: mapped_tensors.Pages | None = None) -> None:
    """Look for NaN and Inf, reading every number once. Memory that is in the `pages` of a mapped file is given back as it is read.

    Raises:
        UserError: some number is NaN or Inf, by key.
    """
    for key, tensor in tensors.items():
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().contiguous().view(-1)
        for chunk in flat.split(_CHUNK):
            # The sum of finite numbers may overflow; then each is asked.
            if not torch.isfinite(chunk.sum(dtype=torch.float32)) and not torch.isfinite(chunk).all():
                what = "NaN" if torch.isnan(chunk).any() else "Inf"
                raise UserError(
                    f"{path}: {key} contains {what}: its training diverged, or the file is corrupt. Give an earlier checkpoint, or download it again"
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
    """An RWKV-4 model from a checkpoint. Sizes come from the shapes; dtype None keeps the one each tensor was stored in.

    What stays on the CPU in its stored dtype stays in the file, mapped: training never writes it (rwkv.mapped_tensors). All else is made one tensor after the
    other, and takes no second copy on the way.

    Args:
        matrices: the dtype of matrices, where it is another.

    Raises:
        UserError: not an RWKV-4 checkpoint; a missing, surplus or misshapen key, or one with NaN or Inf, by name.
    """
    tensors = read_tensors(path)
    pages, taken = mapped_tensors.Pages(path), set()
    sizes = sizes_of(tensors, path)
    check_shapes(tensors, sizes, path)
    check_finite(tensors, path, pages)
    model = RWKV(sizes)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        source = tensors.pop(name).detach()
        value = source.to(device, (matrices if lora.is_matrix(source) else None) or dtype).contiguous()
        if compat.storage(value).data_ptr() in taken:  # two of one memory would train as one
            value = value.clone()
        taken.add(compat.storage(value).data_ptr())
        parameter.data = value
        if value.data_ptr() != source.data_ptr():
            pages.drop(source)
    return model


def _dtypes(path: PathLike) -> dict[str, torch.dtype]:
    """What the tensors of a checkpoint are stored in."""
    return {name: tensor.dtype for name, tensor in read_tensors(path).items()}


def fill(model: RWKV, tensors: Mapping[str, Tensor], path: PathLike, partial: bool = False) -> None:
    """Copy a checkpoint's tensors into a model; one that is missing stays as it is if `partial`.

    Raises:
        UserError: a key that does not fit, or has NaN or Inf, by name.
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
    """Write all weights under upstream's names; of an adapted model those of its base. `weights` where the model does not hold them itself. `check` as in
    write_tensors."""
    tensors = weights or {name: parameter for name, parameter in model.named_parameters() if ".lora_" not in name}
    write_tensors(path, tensors, {"kind": "model", **describe(model), **manifest}, check)


def save_adapter(
    path: PathLike,
    model: RWKV,
    adapter: Mapping[str, Any],
    manifest: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter alone. `adapter`: r, alpha, parts, base, base_sha256. `weights` as in save_model."""
    tensors = lora.adapter_state(model, adapter["parts"]) if weights is None else weights
    write_tensors(path, tensors, {"kind": "adapter", **describe(model), **adapter, **manifest})


def describe(model: RWKV) -> dict[str, Any]:
    """What a manifest states about any file of a model: its version and sizes."""
    return {"version": model.version.NAME, "sizes": vars(model.sizes)}


def adapter_manifest(path: PathLike) -> dict[str, Any]:
    """What is known of an adapter beside its tensors: of ours `<path>.json`, of peft's r and alpha from its adapter_config.json; empty if there is neither.

    Raises:
        UserError: a value in it that an adapter cannot have.
    """
    parts = version.DEFAULT.PARTS.names
    if config := peft_adapter.config_of(Path(path)):
        return manifests.check_adapter(peft_adapter.described(config), config, parts)
    return manifests.check_adapter(manifests.read(path), manifests.path_of(path), parts)


def find_base(path: PathLike) -> Path | None:
    """The base model that the manifest of an adapter names, where it is now; None if it names none, or none is found (`rwkv.weights.manifest.find_base`)."""
    return manifests.find_base(adapter_manifest(path), path)


def inspect_adapter(
    path: PathLike, base: PathLike | None = None, alpha: float | None = None, base_sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and what is known of it: r, parts, alpha, base, base_sha256. Nothing of the base but its hash is read.

    r and the parts come from the tensors (r from the manifest if none is of rank r). alpha, base and its hash come from the manifest, or from the
    arguments where there is none; `base_sha256` spares hashing `base` again. `path` may also be a folder of peft's, or the file in it.

    Raises:
        UserError: not an adapter; NaN or Inf in it; made for another base; alpha unknown, or not the one it was trained with.
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
            f"{path}: adapts {_some(foreign)}, which has no adapter here (any of {', '.join(of_version.layers)} may have one); merge it with the"
            " program that wrote it, and give the merged model"
        )
    if len(ranks) > 1:
        raise UserError(
            f"{path}: its layers have different ranks ({', '.join(map(str, sorted(ranks)))}), and one for all is supported"
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
            f"{path}: of rank {known['r']}, and {manifests.path_of(path).name} says {manifest.get('r')}: it belongs to another file"
        )
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(
            f"{path}: alpha {alpha} was given; it is a number above 0, the one that the adapter was trained with"
        )
    if alpha is not None and known.setdefault("alpha", alpha) != alpha:
        raise UserError(
            f"{path}: trained with alpha {known['alpha']:g}, and alpha {alpha:g} was given; omit alpha, or give {known['alpha']:g}"
        )
    if "alpha" not in known:
        raise UserError(
            f"{path}: its alpha is not known (there is no {manifests.path_of(path).name} beside it that says it); give the one it was trained with"
            " by --lora_alpha"
        )
    if base is not None:
        if not os.path.isfile(base):
            raise UserError(f"{base}: no such base model (the adapter is {path}); give the file that it was trained on")
        known["base"], expected = str(base), known.get("base_sha256")
        known["base_sha256"] = base_sha256 or sha256(base)
        if expected and known["base_sha256"] != expected.lower():
            raise UserError(
                f"{path}: an adapter for another base. It was trained on {manifest.get('base')} (SHA-256 {expected[:12]}…), and {base} is"
                f" {str(known['base_sha256'])[:12]}…; give the base it was trained on"
            )
    return tensors, known


def load_adapter(model: RWKV, path: PathLike, tensors: Mapping[str, Tensor], parts: list[str]) -> None:
    """Copy an adapter's tensors into a model that lora.inject has prepared. Raises UserError naming a key that does not fit."""
    shapes = {name: dict(model.named_parameters())[name].shape for name in lora.adapter_names(model, parts)}
    _fill(model, tensors, shapes, path)


def load_tuned(
    base: PathLike, adapter: PathLike, alpha: float | None = None, matrices: torch.dtype | None = None
) -> tuple[RWKV, dict[str, torch.dtype]]:
    """A base model with its adapter injected and not merged, fp32 (its matrices in another dtype if given), and the dtypes that the base is stored in.

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
    """As load_tuned, with several adapters of one base at once, each by its weight (lora.combine).

    Raises UserError as load_model and inspect_adapter do.
    """
    found, parts, r = [], set(), 0
    for path, weight in zip(
        adapters, weights, strict=True
    ):  # before the base is read: their manifests say which it must be
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
    """Compare an adapter's shapes with the model's layers. Raises UserError naming keys that do not fit."""
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
    """Copy tensors into the parameters named in `shapes`, all of them and no others."""
    _check_keys(tensors, shapes, path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in tensors.items():
            parameters[key].copy_(value)


def _check_keys(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: PathLike) -> None:
    """Refuse tensors that are not those named in `shapes`, all of them and no others."""
    missing, surplus = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    misshapen = [
        f"{key} {list(tensors[key].shape)}, expected {list(shapes[key])}"
        for key in sorted(shapes.keys() & tensors.keys())
        if tensors[key].shape != shapes[key]
    ]
    complaints = [
        f"{word}: {_some(keys)}"
        for word, keys in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen))
        if keys
    ]
    if complaints:
        raise UserError(f"{path}: its keys do not fit. " + "; ".join(complaints))


def _bytes(value: Any) -> int:
    """At least what a file of it takes."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() + 1024  # its name, its header, its alignment
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return 1024 + sum(map(_bytes, inside)) if inside else 64


def _some(keys: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(key[:200] for key in keys[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")
