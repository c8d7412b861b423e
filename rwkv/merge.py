"""Merge LoRA adapters into their base and prove it: the largest difference between the logits of both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rwkv import checkpoint
from rwkv.adapters import lora
from rwkv.errors import UserError
from rwkv.models import RWKV
from rwkv.weights import manifest as manifests


@dataclass(frozen=True)
class Merged:
    """What a merge wrote: the dtypes in the file, and, if it was checked, the largest difference between the logits of the
    merged model and of base + adapter, and the largest logit."""

    dtypes: list[str]
    difference: float | None = None
    largest: float | None = None


def base_of(adapter: str) -> Path:
    """The base that the adapter's manifest names. Raises UserError if it names none, or the file does not exist."""
    if base := checkpoint.find_base(adapter):
        return base
    named = checkpoint.adapter_manifest(adapter).get("base")
    if named:
        raise UserError(f"{adapter}: its base {named}, which the .json beside it names, is not there; give --base")
    raise UserError(f"{adapter}: there is no .json beside it that names its base; give --base")


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
        base: the base model; empty: the one that the first adapter's manifest names.
        alpha: of adapters whose manifest has none.
        check_tokens: compare the logits of both models on so many random tokens; 0: do not.

    Raises:
        UserError: an adapter that does not fit; a weight or logit that is NaN or Inf; then nothing is written.
    """
    manifest, base = checkpoint.adapter_manifest(adapters[0]), base or base_of(adapters[0])
    model, stored = checkpoint.load_combined(base, adapters, weights, alpha)
    model.eval().to(device)
    names = ",".join(adapters)
    apart = _logits(model, check_tokens) if check_tokens else None
    if apart is not None and not torch.isfinite(apart).all():
        raise UserError(
            f"{names}: the logits of base + adapter are NaN or Inf, so the merged model cannot be checked, and nothing is written. Its"
            " alpha or --weights are too large, or the adapter's training diverged"
        )
    lora.merge(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored[name])
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"{names}: {name} of the merged model is NaN or Inf in {_short(stored[name])}; nothing is written. Its alpha"
                " or --weights are too large, or the base's dtype cannot represent the sum"
            )
    found: list[float] = []

    def compare(_: Path) -> None:
        if apart is None:
            return
        found.append(float((_logits(model, check_tokens) - apart).abs().max()))
        if not math.isfinite(found[0]):
            raise UserError(f"{output}: the logits of the merged model are NaN or Inf; nothing is written")

    origin: dict[str, Any] = {
        key: manifest[key] for key in ("base_sha256", "tokenizer", "data", "data_sha256") if key in manifest
    }
    sources = {manifests.portable(path, output): weight for path, weight in zip(adapters, weights, strict=True)}
    checkpoint.save_model(output, model, {"merged_from": sources, "base": str(base), **origin}, check=compare)
    dtypes = sorted({_short(dtype) for dtype in stored.values()})
    return Merged(dtypes) if apart is None else Merged(dtypes, found[0], float(apart.abs().max()))


@torch.inference_mode()
def _logits(model: RWKV, count: int) -> torch.Tensor:
    """Of `count` random tokens, the same at every call, in fp32."""
    tokens = torch.randint(model.sizes.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    return model.float()(tokens.to(model.emb.weight.device))[0]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
