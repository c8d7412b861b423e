"""What a run starts from: its model, its adapter."""

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import torch

from rwkv import checkpoint, compat
from rwkv.adapters import lora
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.data.convert import char_level
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.models import RWKV, Sizes, version
from rwkv.train.runtime import strategy, trainer

NEW_BASE = "rwkv-base.pth"  # of LoRA on a new model


def make_model(c: TrainConfig, base: Path | None = None) -> RWKV:
    """From load_model, with flags that disagree refused; else new, by upstream's rules. `base`: the new model that an earlier start of this run wrote."""
    given = version.sizes_given(c)
    if c.load_model and c.load_partial:
        tensors = checkpoint.read_tensors(c.load_model)
        model = _new(c, replace(checkpoint.sizes_of(tensors, c.load_model), **given))
        checkpoint.fill(model, tensors, c.load_model, partial=True)
        return model
    if c.load_model:
        model = checkpoint.load_model(c.load_model, matrices=_frozen(c))
        wrong = [
            f"--{name} {value}, and it has {getattr(model.sizes, name)}"
            for name, value in given.items()
            if value != getattr(model.sizes, name)
        ]
        if c.data_type in char_level.TEXTS and c.vocab_size != model.sizes.vocab_size:
            raise UserError(
                f"{c.load_model}: has a vocabulary of {model.sizes.vocab_size}, and --data_type {c.data_type} makes one of the text's"
                f" {c.vocab_size} characters; convert the text for the model with scripts/convert.py"
            )
        if wrong:
            raise UserError(
                f"{c.load_model}: {'; '.join(wrong)}. Sizes come from the checkpoint: leave these flags out"
            )
        model.grad_cp, model.dropout = bool(c.grad_cp), c.dropout
        return model
    if base:  # initialising it again would depend on the machine: LAPACK's threads, MKL's version
        model = checkpoint.load_model(base, matrices=_frozen(c))
        model.grad_cp, model.dropout = bool(c.grad_cp), c.dropout
        return model
    return _new(c, version.DEFAULT.Sizes(**given))


def _new(c: TrainConfig, sizes: Sizes) -> RWKV:
    model = RWKV(sizes, bool(c.grad_cp), c.dropout)
    model.initialise(emb_scale=c.lr_init, frozen=_adapts(c))
    return model


def _adapts(c: TrainConfig) -> TypeGuard[LoRAConfig]:
    """Whether the run trains an adapter."""
    return isinstance(c, LoRAConfig) and c.lora


def _frozen(c: TrainConfig) -> torch.dtype:
    """What frozen weights are kept in."""
    if not _adapts(c):
        return torch.float32
    kept = c.precision if c.lora_base == "auto" else c.lora_base
    if kept == "bf16" and not (strategy.alone(c) or trainer.on_gpu(c) or compat.gloo_sends_bf16()):
        if c.lora_base == "bf16":
            raise UserError(
                "--lora_base bf16: processes on CPUs cannot send each other bf16 with this torch, as ddp does when it starts; leave it out, and the"
                " base is kept in fp32, or take the modern stack (make venv STACK=modern)"
            )
        return torch.float32
    return torch.bfloat16 if kept == "bf16" else torch.float32


def adapt(model: RWKV, c: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """Inject LoRA if the run is one; what the adapter's manifest will say of it. A new model, which is then its base, is to be
    found in `folder` (see `keep_base`)."""
    if not _adapts(c):
        return None
    parts = list(lora.parts_in(c.lora_parts))
    try:
        lora.inject(model, parts, c.lora_r, c.lora_alpha, c.lora_dropout)
    except ValueError as error:
        raise UserError(f"--lora_parts {c.lora_parts} --lora_r {c.lora_r}: {error}") from error
    lora.mark_trainable(model, parts)
    lora.store_frozen(model, _frozen(c))
    if c.lora_load:
        said = checkpoint.adapter_manifest(c.lora_load).get(
            "alpha"
        )  # upstream's adapters do not say it: the flag then does
        tensors, known = checkpoint.inspect_adapter(
            c.lora_load, c.load_model or None, c.lora_alpha if said is None else None
        )
        _compare(model, c, known)
        checkpoint.load_adapter(
            model, c.lora_load, tensors, known["parts"]
        )  # what it lacks begins as the base has it, as upstream
    base = (
        {"base": c.load_model, "base_sha256": sha256(c.load_model)}
        if c.load_model
        else {"base": str(folder / NEW_BASE)}
    )
    return {"r": c.lora_r, "alpha": c.lora_alpha, "parts": parts, **base}


def _compare(model: RWKV, c: LoRAConfig, known: dict[str, Any]) -> None:
    """Raises UserError unless the run can continue from an adapter of which this is known."""
    possible = model.version.PARTS
    theirs, ours = known["parts"], possible.normal(lora.parts_in(c.lora_parts))
    merge = f"merge it into its base and train a new one: scripts/merge_lora.py --adapter {shlex.quote(c.lora_load)}"
    matrices = any(map(possible.layers_of, theirs))  # without them rank and alpha do not matter
    if matrices and known["r"] != c.lora_r:
        raise UserError(
            f"{c.lora_load}: this adapter has rank {known['r']}, and --lora_r is {c.lora_r}; a rank cannot be changed. Give --lora_r {known['r']}, or {merge}"
        )
    if matrices and known["alpha"] != c.lora_alpha:
        raise UserError(
            f"{c.lora_load}: this adapter was trained with alpha {known['alpha']:g}, and --lora_alpha is {c.lora_alpha:g}, which would scale it by"
            f" {c.lora_alpha / known['alpha'] if known['alpha'] else math.inf:g}. Give --lora_alpha {known['alpha']:g}, or {merge}"
        )
    has, takes = (
        {layer for part in parts for layer in possible.layers_of(part) or (part,)} for parts in (theirs, ours)
    )
    if more := has - takes:
        raise UserError(
            f"{c.lora_load}: this adapter has parts that --lora_parts {c.lora_parts} does not have ({', '.join(sorted(more))}), and would lose them. Give"
            f" --lora_parts {','.join(theirs)} or more, or {merge}"
        )


def keep_base(model: RWKV, adapter: dict[str, Any], folder: Path, kept: Path | None) -> dict[str, Any]:
    """Write the new model that LoRA was injected into, before it trains, unless an earlier start of the run has `kept` it: without it the adapter is of
    no use. What run.json says of it."""
    path = folder / NEW_BASE
    if not kept:
        checkpoint.save_model(path, model, {"step": 0})
    adapter["base_sha256"] = sha256(path)
    return {"path": str(path), "sha256": adapter["base_sha256"]}
