"""Read and write files of LoRA adapters and tuned states; load models with them."""

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv import checkpoint
from rwkv.adapters import lora
from rwkv.adapters import state as states
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.formats.lazy import Lazy
from rwkv.models import RWKV, State, version
from rwkv.models.parts import Parts, layer_of
from rwkv.weights import kinds, peft_adapter
from rwkv.weights import manifest as manifests

PathLike = str | Path


def save_adapter(
    path: PathLike,
    model: RWKV,
    adapter: Mapping[str, Any],
    manifest: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write only the adapter, which may be a tuned state.

    Args:
        adapter: for the manifest: r, alpha, parts, base, base_sha256; a tuned state has no r and
            alpha.
        weights: as in checkpoint.save_model.
    """
    tensors = lora.adapter_state(model, adapter["parts"]) if weights is None else weights
    kind = "state" if states.is_state(tensors) else "adapter"
    checkpoint.write_tensors(path, tensors, {"kind": kind, **checkpoint.describe(model), **adapter, **manifest})


def read_manifest(path: PathLike) -> dict[str, Any]:
    """An adapter's manifest: `<path>.json`; for peft adapters, r and alpha from
    adapter_config.json. Empty if there is neither.

    Raises:
        UserError: a value in it is invalid.
    """
    parts = {name: known.PARTS.names for name, known in version.VERSIONS.items()}
    if config := peft_adapter.config_of(Path(path)):
        return manifests.check_adapter(peft_adapter.read_config(config), config, parts)
    return manifests.check_adapter(manifests.read(path), manifests.path_of(path), parts)


def find_base(path: PathLike) -> Path | None:
    """The base model named in an adapter's manifest; None if there is none or it is not found
    (`rwkv.weights.manifest.find_base`).
    """
    return manifests.find_base(read_manifest(path), path)


def inspect_adapter(
    path: PathLike, base: PathLike | None = None, alpha: float | None = None, base_sha256: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter without loading its base: its tensors, and a dictionary of r, parts,
    use_dora, alpha, base, base_sha256.

    r, parts and use_dora are inferred from the tensors (r from the manifest if no tensor has it);
    alpha, base and base_sha256 come from the manifest, else from the arguments.

    Args:
        path: the adapter; also a folder written by peft, or the file in it.
        base: the base model; its hash must be that in the manifest.
        alpha: required if the manifest has none; otherwise it must be the same.
        base_sha256: the hash of `base`, if known.

    Raises:
        UserError: not an adapter; it contains NaN or Inf; it belongs to another base; alpha is
            unknown or differs from the manifest.
    """
    tensors = checkpoint.read_tensors(peft_adapter.file_of(Path(path)))
    if kind := kinds.why_not_adapter(tensors, version.fully_trained):
        raise UserError(f"{path}: {kind}")
    manifest = read_manifest(path)
    if not manifest and (initial := _pissa_matrices(Path(path))):
        raise UserError(
            f"{path}: an adapter of PiSSA (RWKV-PEFT): {initial.name} beside it has the initial matrices, which were subtracted from the base."
            " Merge both with RWKV-PEFT, and use the merged model"
        )
    ranks = {value.shape[0] if value.dim() else 0 for key, value in tensors.items() if key.endswith(".lora_A")}
    ranks |= {value.shape[-1] if value.dim() else 0 for key, value in tensors.items() if key.endswith(".lora_B")}
    of_version = _version_of(tensors, manifest, base).PARTS
    foreign, parts = lora.foreign_layers(tensors, of_version), lora.parts_of(tensors, of_version)
    if foreign:
        raise UserError(
            f"{path}: adapts {checkpoint.list_names(foreign)}, but only {', '.join(of_version.layers)} can have adapters here; merge it with the"
            " program that wrote it, and use the merged model"
        )
    if len(ranks) > 1:
        raise UserError(
            f"{path}: its layers have different ranks ({', '.join(map(str, sorted(ranks)))}); only a single rank is supported;"
            " merge it with the program that wrote it, and use the merged model"
        )
    if not parts:
        raise UserError(
            f"{path}: not a LoRA adapter (its tensors are {checkpoint.list_names(sorted(tensors), 3)}); {kinds.USE_ADAPTER}"
        )
    checkpoint.check_finite(tensors, path)
    if not ranks:  # neither matters
        manifest, alpha = {"alpha": 1.0, **manifest}, None
    known: dict[str, Any] = {
        "r": ranks.pop() if ranks else manifest.get("r", 1),
        "parts": parts,
        "use_dora": lora.uses_dora(tensors),
        **{k: manifest[k] for k in ("alpha", "base", "base_sha256") if k in manifest},
    }
    if known["r"] < 1 or known["r"] != manifest.get("r", known["r"]):
        described = peft_adapter.config_of(Path(path)) or manifests.path_of(path)
        raise UserError(
            f"{path}: rank {known['r']}, but {described.name} states {manifest.get('r')}; that file belongs to another adapter: restore the"
            " right one, or remove it"
        )
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"{path}: alpha {alpha}: must be a positive number, the one that the adapter was trained with")
    # the message has 9 digits, which may be passed
    if alpha is not None and not math.isclose(known.setdefault("alpha", alpha), alpha, rel_tol=1e-7):
        raise UserError(
            f"{path}: trained with alpha {known['alpha']:.9g}, not {alpha:.9g}; omit alpha, or use {known['alpha']:.9g}"
        )
    if "alpha" not in known:
        raise UserError(
            f"{path}: its alpha is unknown (no {manifests.path_of(path).name} with alpha beside it); pass the one it was trained with as --lora_alpha"
        )
    if base is not None:
        if os.path.isdir(base):
            raise UserError(
                f"{base}: a folder, given as the base of adapter {path}. Make one file of it: python scripts/export.py --model {base} --output base.pth"
            )
        if not os.path.isfile(base):
            raise UserError(
                f"{base}: no such file, given as the base of adapter {path}; use the model that the adapter was trained on"
            )
        known["base"], expected = str(base), known.get("base_sha256")
        known["base_sha256"] = base_sha256 or sha256(base)
        if expected and known["base_sha256"] != expected.lower():
            raise UserError(
                f"{path}: adapter of another base: trained on {manifest.get('base')} (SHA-256 {expected[:12]}…), but {base} has"
                f" {str(known['base_sha256'])[:12]}…; use the base it was trained on"
            )
    return tensors, known


def _pissa_matrices(path: Path) -> Path | None:
    """The file with PiSSA's initial matrices that RWKV-PEFT writes beside an adapter. The adapter
    itself looks like LoRA.
    """
    for name in ("init_pissa.pth", "init_lora.pth"):
        file = path.parent / name
        if file.is_file() and any(".init_lora_" in key for key in checkpoint.read_tensors(file)):
            return file
    return None


def _version_of(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], base: PathLike | None) -> version.Version:
    """An adapter's version: from its manifest, else its base, else its tensors' names."""
    if "version" in manifest:
        return version.VERSIONS[manifest["version"]]
    if base is not None and os.path.isfile(base):
        return version.version_of(checkpoint.sizes_of(checkpoint.read_tensors(base), base))
    return version.fitting(tensors)


def load_state(path: PathLike, model: RWKV, base: PathLike | None = None) -> State:
    """The state of `model` before the first token, for one batch row, from a tuned state: pass it
    to the model with the first tokens. The model itself does not change.

    Args:
        path: written by scripts/state.py or RWKV-PEFT.
        base: the file of the model; its hash must be that in the state's manifest, if it has one.

    Raises:
        UserError: not a tuned state, or one of another model.
    """
    return states.state_of(model, _state_tensors(path, model, base))


def attach_state(path: PathLike, model: RWKV, base: PathLike | None = None) -> None:
    """Let documents begin with a tuned state, in place. Arguments and errors as in `load_state`."""
    tensors = _state_tensors(path, model, base)
    states.attach(model)
    checkpoint.copy_tensors(model, tensors, states.shapes_of(model.sizes), path)


def _state_tensors(path: PathLike, model: RWKV, base: PathLike | None) -> dict[str, Tensor]:
    tensors, _ = inspect_adapter(path, base)
    check_is_state(path)
    checkpoint.check_keys(tensors, states.shapes_of(model.sizes), path)
    return tensors


def check_is_state(path: PathLike) -> None:
    """Raise UserError if an adapter has more than a tuned state."""
    if inspect_adapter(path)[1]["parts"] != [states.PART]:
        raise UserError(f"{path}: not a tuned state (only att.time_state) but a LoRA adapter; pass it as --lora")


def check_one_state(adapter: PathLike, state: PathLike) -> None:
    """Raise UserError if an adapter has a tuned state itself, beside which `state` has no place."""
    if any(name.endswith(".time_state") for name in checkpoint.read_tensors(peft_adapter.file_of(Path(adapter)))):
        raise UserError(
            f"{adapter} and {state}: the adapter has a tuned state itself (it was trained with the part state), and a text"
            " begins with one state only; omit --state, or use an adapter without state"
        )


def load_adapter(model: RWKV, path: PathLike, tensors: Mapping[str, Tensor], parts: list[str]) -> None:
    """Copy an adapter's tensors into a model prepared by lora.inject. Raises UserError naming keys
    that do not fit.
    """
    shapes = {name: dict(model.named_parameters())[name].shape for name in lora.adapter_names(model, parts)}
    checkpoint.copy_tensors(model, tensors, shapes, path)


def load_tuned(
    base: PathLike, adapter: PathLike, alpha: float | None = None, matrices: torch.dtype | None = None
) -> tuple[RWKV, dict[str, torch.dtype]]:
    """Load a base model in fp32 with its adapter, unmerged; returns the model and the base's stored
    dtypes.

    Args:
        matrices: dtype of matrices, instead of fp32.

    Raises UserError like checkpoint.load_model and inspect_adapter.
    """
    tensors, known = inspect_adapter(adapter, base, alpha)
    model = checkpoint.load_model(base, matrices=matrices)
    lora.inject(model, known["parts"], known["r"], known["alpha"], dora=known["use_dora"])
    load_adapter(model, adapter, tensors, known["parts"])
    return model, checkpoint.stored_dtypes(base)


def merged(
    tensors: Mapping[str, Lazy], base: PathLike, adapter: PathLike, alpha: float | None = None
) -> dict[str, Lazy]:
    """The tensors of a base with an adapter merged into them, each when it is computed, adapted
    matrices in fp32: W + (α/r) B A.

    Args:
        tensors: those of `base`, under BlinkDL's names.

    Raises UserError like inspect_adapter, and naming keys that do not fit.
    """
    found, known = inspect_adapter(adapter, base, alpha)
    _check_shapes({name: tensor.shape for name, tensor in tensors.items()}, found, adapter)
    scale, result = known["alpha"] / known["r"], dict(tensors)
    for name, tensor in found.items():
        layer, adapted, half = name.rpartition(".lora_")
        if not adapted:
            result[name] = Lazy.of(tensor)
        elif half == "A":
            b, magnitudes = found[f"{layer}.lora_B"], found.get(f"{layer}.lora_magnitude_vector")
            result[f"{layer}.weight"] = _with_product(tensors[f"{layer}.weight"], tensor, b, scale, magnitudes)
    return result


def _with_product(weight: Lazy, a: Tensor, b: Tensor, scale: float, magnitudes: Tensor | None) -> Lazy:
    def add(tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta":
            return tensor.float()
        return lora.merged(tensor, a, b, scale, magnitudes)

    return weight.then(add)


def load_combined(
    base: PathLike, adapters: Sequence[PathLike], weights: Sequence[float], alpha: float | None = None
) -> tuple[RWKV, dict[str, torch.dtype]]:
    """Like load_tuned, but with a weighted sum of several adapters of one base (lora.combine).

    Raises UserError like checkpoint.load_model and inspect_adapter.
    """
    found, parts, r = [], set(), 0
    for path, weight in zip(adapters, weights, strict=True):  # fails early if the base is wrong
        tensors, known = inspect_adapter(path, base, alpha)
        if known["use_dora"]:
            if len(adapters) == 1 and weight == 1:
                return load_tuned(base, path, alpha)
            raise UserError(
                f"{path}: a DoRA adapter, whose effect is not a sum: it cannot be added to others or weighted; merge it alone, with weight 1"
            )
        found.append((tensors, known["alpha"] / known["r"], weight))
        parts |= set(known["parts"])
        r += known["r"] * any(name.endswith(".lora_A") for name in tensors)
    model = checkpoint.load_model(base)
    for (tensors, _, _), path in zip(found, adapters, strict=True):
        _check_shapes({name: parameter.shape for name, parameter in model.named_parameters()}, tensors, path)
    combined = lora.combine(found, dict(model.named_parameters()))
    lora.inject(model, parts, max(1, r), max(1, r))
    load_adapter(model, " + ".join(map(str, adapters)), combined, list(parts))
    return model, checkpoint.stored_dtypes(base)


def _check_shapes(model: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], path: PathLike) -> None:
    """Compare an adapter's shapes with those of the model's parameters. Raises UserError naming
    keys that do not fit.
    """
    shapes: dict[str, torch.Size] = {}
    for key, value in tensors.items():
        name, adapts, half = key.rpartition(".lora_")
        weight = model.get(f"{name}.weight" if adapts else key)
        if weight is not None and adapts:
            r = value.shape[0 if half == "A" else -1] if value.dim() else 0
            possible = {"A": [r, weight[1]], "B": [weight[0], r], "magnitude_vector": [weight[0]]}
            shapes[key] = torch.Size(possible[half])
        elif weight is not None:
            shapes[key] = weight
    kind, sizes = version.detect(model)
    if any(key.endswith(".time_state") for key in tensors):
        shapes |= states.shapes_of(sizes)
    absent = _names_of_parts(model, tensors, kind.PARTS) - tensors.keys()
    checkpoint.check_keys(tensors, {**shapes, **{key: torch.Size() for key in absent}}, path)


def _names_of_parts(model: Iterable[str], adapter: Collection[str], known: Parts) -> set[str]:
    """The tensor names of a complete adapter of this model that has the parts of `adapter`."""
    parts = lora.parts_of(adapter, known)
    layers = {layer for part in parts for layer in known.layers_of(part)}
    halves = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if lora.uses_dora(adapter) else [])]
    names = {name for name in model if known.fully_trained(name, parts)}
    for name in model:
        layer, dot, end = name.rpartition(".")
        if dot and end == "weight" and layer_of(layer) in layers:
            names |= {f"{layer}.{half}" for half in halves}
    return names
