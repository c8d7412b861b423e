"""Merge LoRA adapters and tuned states into their base, and compare logits to verify it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rwkv import adapter_files, checkpoint
from rwkv.adapters import lora
from rwkv.errors import UserError
from rwkv.models import RWKV
from rwkv.weights import manifest as manifests


@dataclass(frozen=True)
class Merged:
    """Result of a merge.

    Attributes:
        dtypes: those in the file.
        difference: the largest absolute difference between the logits of the merged model and of
            base + adapter; None: not checked.
        largest: the largest absolute logit; None: not checked.
    """

    dtypes: list[str]
    difference: float | None = None
    largest: float | None = None


def base_of(adapter: str) -> Path:
    """The base named in the adapter's manifest. Raises UserError if there is none, or the file does
    not exist.
    """
    if base := adapter_files.find_base(adapter):
        return base
    named = adapter_files.read_manifest(adapter).get("base")
    if named:
        raise UserError(f"{adapter}: its base {named} (named in its .json) does not exist; pass --base")
    raise UserError(f"{adapter}: no .json beside it names its base; pass --base")


def merge(
    output: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    base: str | Path = "",
    alpha: float | None = None,
    check_tokens: int = 0,
    device: str = "cpu",
) -> Merged:
    """Write base + Σ weight · adapter to `output`, in the base's dtypes.

    Args:
        base: the base model; empty: the one named in the first adapter's manifest.
        alpha: for adapters without one in their manifest.
        check_tokens: number of random tokens on which logits are compared; 0: no check.

    Raises:
        UserError: an adapter does not fit, or a weight or logit is NaN or Inf; nothing is written.
    """
    manifest, base = adapter_files.read_manifest(adapters[0]), base or base_of(adapters[0])
    model, stored = adapter_files.load_combined(base, adapters, weights, alpha)
    model.eval().to(device)
    names = ",".join(adapters)
    unmerged = _logits(model, check_tokens) if check_tokens else None
    if unmerged is not None and not torch.isfinite(unmerged).all():
        raise UserError(
            f"{names}: the logits of base + adapter are NaN or Inf, so the merged model cannot be verified; nothing is written."
            " Either alpha or --weights are too large, or the adapter's training diverged"
        )
    lora.merge(model)
    for name, parameter in model.named_parameters():
        dtype = stored.get(name, torch.float32)  # a base may have no initial state
        parameter.data = parameter.data.to(dtype)
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"{names}: {name} of the merged model is NaN or Inf in {_short(dtype)}; nothing is written."
                " Either alpha or --weights are too large, or the base's dtype cannot represent the sum"
            )
    found: list[float] = []

    def compare(_: Path) -> None:
        if unmerged is None:
            return
        found.append(float((_logits(model, check_tokens) - unmerged).abs().max()))
        if not math.isfinite(found[0]):
            raise UserError(
                f"{output}: the logits of the merged model are NaN or Inf; nothing is written. Convert the base with"
                " scripts/export.py --dtype fp32, and merge again"
            )

    origin: dict[str, Any] = {
        key: manifest[key] for key in ("base_sha256", "tokenizer", "data", "data_sha256") if key in manifest
    }
    sources = {manifests.relative_path(path, output): weight for path, weight in zip(adapters, weights, strict=True)}
    checkpoint.save_model(output, model, {"merged_from": sources, "base": str(base), **origin}, check=compare)
    dtypes = sorted({_short(dtype) for dtype in stored.values()})
    return Merged(dtypes) if unmerged is None else Merged(dtypes, found[0], float(unmerged.abs().max()))


@torch.inference_mode()
def _logits(model: RWKV, count: int) -> torch.Tensor:
    """Logits in fp32 on `count` random tokens, the same in every call."""
    tokens = torch.randint(model.sizes.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    return model.float()(tokens.to(model.emb.weight.device))[0]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
