"""Checkpoints: read and write .pth and .safetensors, take the sizes from the shapes, keep a manifest beside the weights.

A file is never trusted to be what its name says: loading runs no code from it (weights only), and a missing, surplus or
misshapen key is refused by its name.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from rwkv import __version__, compat, lora, mapped
from rwkv.errors import UserError
from rwkv.files import reserve, sha256, whole, write_json
from rwkv.model import RWKV, Sizes

PathLike = str | Path


def read_tensors(path: PathLike) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, on the CPU, in the dtypes they were stored in. They stay in the file, mapped (rwkv.mapped).

    Raises:
        UserError: no such file, or not a dictionary of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            return _aligned(safetensors.torch.load_file(path))  # mapped by that library
        tensors = mapped.load(path)
    except Exception as error:  # foreign bytes make the readers raise almost anything
        raise UserError(
            f"{path}: not a checkpoint that can be loaded without running code from it ({_first_line(error)}). A checkpoint is a"
            " dictionary of tensors, saved by torch.save or safetensors; the file may also be cut short."
        ) from error
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(x, Tensor) and isinstance(key, str) for key, x in tensors.items())
    ):
        raise UserError(f"{path}: holds {type(tensors).__name__}, not a dictionary of tensors; give the model's state_dict")
    return _aligned({key.removeprefix("_forward_module."): value for key, value in tensors.items()})  # DeepSpeed leaves this prefix


def _aligned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that begin in their file where no number of their dtype may are copied."""
    return {key: value.clone() if value.data_ptr() % value.element_size() else value for key, value in tensors.items()}


def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write the tensors and, beside them, `<path>.json`; each whole or not at all."""
    path = Path(path)
    tensors = _compact(tensors)
    stack = {"rwkv-trainer": __version__, "torch": torch.__version__}
    with whole(path) as temporary:
        if path.suffix == ".safetensors":
            save_safetensors(tensors, temporary)
        else:
            save(tensors, temporary)
        # A manifest never lies beside weights it does not describe: the old one goes first, the new one comes last.
        manifest_path(path).unlink(missing_ok=True)
    write_json(manifest_path(path), {**manifest, "stack": stack})


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


def save_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As transformers reads them. `path` is a temporary file's (rwkv.files.whole)."""
    safetensors.torch.save_file(dict(tensors), path, metadata={"format": "pt"})


def save(value: Any, path: Path) -> None:
    """torch.save into a file that exists, its room set aside first: where the disk fills up, torch 1.13.1 takes the whole process down.

    Raises:
        OSError: there is no room.
    """
    with open(path, "r+b") as file:
        reserve(file, _bytes(value))
        torch.save(value, file)
        file.truncate()


def manifest_path(path: PathLike) -> Path:
    """`<path>.json`."""
    return Path(f"{path}.json")


def read_manifest(path: PathLike) -> dict[str, Any]:
    """What `<path>.json` says of the checkpoint; empty if there is none, as with upstream's files."""
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{manifest_path(path)}: not valid JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{manifest_path(path)}: holds a {type(manifest).__name__}, not what is known of a checkpoint")
    return manifest


def sizes_of(tensors: Mapping[str, Tensor], path: PathLike) -> Sizes:
    """The model's sizes from its tensors' shapes. Raises UserError if this is no RWKV-4 checkpoint."""
    layers = {int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))}
    pre_ffn = "blocks.0.ffnPre.key.weight" in tensors
    first_att = next((f"blocks.{layer}.att." for layer in sorted(layers) if f"blocks.{layer}.att.time_decay" in tensors), None)
    wanted = ["emb.weight", "blocks.0.ffn.key.weight"]
    missing = [key for key in wanted if key not in tensors or tensors[key].dim() != 2]
    if missing or not layers or (first_att is None and not pre_ffn):
        hint = "; it is a LoRA adapter: give its base, and the adapter with --lora" if any(".lora_" in key for key in tensors) else ""
        raise UserError(f"{path}: not an RWKV-4 checkpoint (no {', '.join(missing) or 'blocks.*.att.time_decay'}){hint}")
    if first_att is not None and tensors[f"{first_att}time_decay"].dim() != 1:
        raise UserError(f"{path}: an RWKV of version 5 or later ({first_att}time_decay is not a vector); version 4 is supported")
    vocab_size, n_embd = tensors["emb.weight"].shape
    dim_att = n_embd if first_att is None else tensors[f"{first_att}time_decay"].shape[0]
    return Sizes(max(layers) + 1, n_embd, vocab_size, dim_att, tensors["blocks.0.ffn.key.weight"].shape[0], pre_ffn)


def load_model(
    path: PathLike,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    matrices: torch.dtype | None = None,
    by_rows: bool = False,
) -> RWKV:
    """An RWKV-4 model from a checkpoint. Sizes come from the shapes; dtype None keeps the one each tensor was stored in.

    What stays on the CPU in its stored dtype stays in the file, mapped: training never writes it (rwkv.mapped). All else is made one tensor after the
    other, and takes no second copy on the way.

    Args:
        matrices: the dtype of matrices, where it is another.
        by_rows: of the embedding only rows will be read, of the words that occur, as in LoRA, which does not train it.

    Raises:
        UserError: not an RWKV-4 checkpoint; a missing, surplus or misshapen key, by name.
    """
    tensors = read_tensors(path)
    pages, taken = mapped.Pages(path), set()
    model = RWKV(sizes_of(tensors, path))
    parameters = dict(model.named_parameters())
    _check_keys(tensors, {name: parameter.shape for name, parameter in parameters.items()}, path)
    for name, parameter in parameters.items():
        source = tensors.pop(name).detach()
        value = source.to(device, (matrices if lora.is_matrix(source) else None) or dtype).contiguous()
        if compat.storage(value).data_ptr() in taken:  # two of one memory would train as one
            value = value.clone()
        taken.add(compat.storage(value).data_ptr())
        parameter.data = value
        if value.data_ptr() != source.data_ptr():
            pages.drop(source)
    if by_rows:
        pages.scattered(model.emb.weight)
    return model


def _dtypes(path: PathLike) -> dict[str, torch.dtype]:
    """What the tensors of a checkpoint are stored in."""
    return {name: tensor.dtype for name, tensor in read_tensors(path).items()}


def fill(model: RWKV, tensors: Mapping[str, Tensor], path: PathLike, partial: bool = False) -> None:
    """Copy a checkpoint's tensors into a model; one that is missing stays as it is if `partial`.

    Raises:
        UserError: a key that does not fit, by name.
    """
    _fill(model, tensors, {name: p.shape for name, p in model.named_parameters() if name in tensors or not partial}, path)


def save_model(path: PathLike, model: RWKV, manifest: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> None:
    """Write all weights under upstream's names; of an adapted model those of its base. `weights` where the model does not hold them itself."""
    tensors = weights or {name: parameter for name, parameter in model.named_parameters() if ".lora_" not in name}
    write_tensors(path, tensors, {"kind": "model", "version": "4", "sizes": vars(model.sizes), **manifest})


def save_adapter(
    path: PathLike, model: RWKV, adapter: Mapping[str, Any], manifest: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapter alone. `adapter`: r, alpha, parts, base, base_sha256. `weights` as in save_model."""
    tensors = lora.adapter_state(model, adapter["parts"]) if weights is None else weights
    write_tensors(path, tensors, {"kind": "adapter", "version": "4", "sizes": vars(model.sizes), **adapter, **manifest})


def inspect_adapter(path: PathLike, base: PathLike | None = None, alpha: float | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and what is known of it: r, parts, alpha, base, base_sha256.

    r and the parts come from the tensors (r from the manifest if none is of rank r). alpha, base and its hash come from the manifest, or from the arguments where there is none.

    Raises:
        UserError: not an adapter; made for another base; alpha unknown, or not the one it was trained with.
    """
    tensors, manifest = read_tensors(path), read_manifest(path)
    ranks = {value.shape[0] for key, value in tensors.items() if key.endswith(".lora_A")}
    parts = lora.parts_of(tensors)
    if len(ranks) > 1 or not parts or "emb.weight" in tensors:
        raise UserError(f"{path}: not a LoRA adapter (its tensors are {', '.join(sorted(tensors)[:3])}, …)")
    known: dict[str, Any] = {
        "r": ranks.pop() if ranks else manifest.get("r", 1),
        "parts": parts,
        **{k: manifest[k] for k in ("alpha", "base", "base_sha256") if k in manifest},
    }
    if alpha is not None and known.setdefault("alpha", alpha) != alpha:
        raise UserError(
            f"{path}: trained with alpha {known['alpha']:g}, and alpha {alpha:g} was given; leave alpha out or give {known['alpha']:g}"
        )
    if "alpha" not in known:
        raise UserError(
            f"{path}: its alpha is not known (there is no {manifest_path(path).name} beside it); give the one it was trained with"
        )
    if base is not None:
        if not Path(base).is_file():
            raise UserError(
                f"{base}: no such base model (the adapter is {path}); paths are relative to this folder, give --base or the right one"
            )
        known["base"], expected = str(base), known.get("base_sha256")
        known["base_sha256"] = sha256(base)
        if expected and known["base_sha256"] != expected:
            raise UserError(
                f"{path}: an adapter for another base. It was trained on {manifest.get('base')} (SHA-256 {expected[:12]}…), and {base} is"
                f" {str(known['base_sha256'])[:12]}…; give the base it was trained on"
            )
    return tensors, known


def load_adapter(model: RWKV, path: PathLike, tensors: Mapping[str, Tensor], parts: list[str]) -> None:
    """Copy an adapter's tensors into a model that lora.inject has prepared. Raises UserError naming a key that does not fit."""
    shapes = {name: dict(model.named_parameters())[name].shape for name in lora.adapter_names(model, parts)}
    _fill(model, tensors, shapes, path)


def load_tuned(base: PathLike, adapter: PathLike, alpha: float | None = None) -> tuple[RWKV, dict[str, torch.dtype]]:
    """A base model with its adapter injected and not merged, fp32, and the dtypes that the base is stored in.

    Raises UserError as load_model and inspect_adapter do.
    """
    tensors, known = inspect_adapter(adapter, base, alpha)
    model = load_model(base)
    lora.inject(model, known["parts"], known["r"], known["alpha"])
    load_adapter(model, adapter, tensors, known["parts"])
    return model, _dtypes(base)


def load_combined(
    base: PathLike, adapters: Sequence[PathLike], weights: Sequence[float], alpha: float | None = None
) -> tuple[RWKV, dict[str, torch.dtype]]:
    """As load_tuned, with several adapters of one base at once, each by its weight (lora.combine).

    Raises UserError as load_model and inspect_adapter do.
    """
    model = load_model(base)
    found, parts, r = [], set(), 0
    for path, weight in zip(adapters, weights, strict=True):
        tensors, known = inspect_adapter(path, base, alpha)
        found.append((tensors, known["alpha"] / known["r"], weight))
        parts |= set(known["parts"])
        r += known["r"]
    combined = lora.combine(found, dict(model.named_parameters()))
    lora.inject(model, parts, r, r)
    load_adapter(model, " + ".join(map(str, adapters)), combined, list(parts))
    return model, _dtypes(base)


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
    complaints = [f"{word}: {_some(keys)}" for word, keys in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen)) if keys]
    if complaints:
        raise UserError(f"{path}: its keys do not fit. " + "; ".join(complaints))


def _bytes(value: Any) -> int:
    """At least what a file of it takes."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() + 1024  # its name, its header, its alignment
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return 1024 + sum(map(_bytes, inside)) if inside else 64


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
