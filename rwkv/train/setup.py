"""Create or load the model of a run, and its adapter."""

import math
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv import adapter_files, checkpoint, compat
from rwkv.adapters import lora, state
from rwkv.commands import command, output
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.data.convert import char_level
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.models import RWKV, Sizes, version
from rwkv.train.run import NEW_BASE, Run
from rwkv.train.runtime import strategy
from rwkv.weights import recognise


def sizes_of(c: TrainConfig, new_base: Path | None = None) -> Sizes:
    """The sizes of the model, from load_model or `new_base`, else from the flags. Reads only the
    checkpoint's header.

    Raises:
        UserError: the checkpoint is not a model, or differs from the flags.
    """
    path = c.load_model or new_base
    if not path or (c.my_pile_stage == 1 and c.version):
        return version.new_sizes(c, version.named(c.version))
    if os.path.isdir(path):  # runs compare and hash their base as a file
        raise UserError(f"{path}: {recognise.describe_folder(Path(path))}")
    sizes: Any = checkpoint.sizes_of(checkpoint.read_tensors(path), path)
    kind = version.version_of(sizes)
    if c.version and version.named(c.version) is not kind:
        raise UserError(f"{path}: an RWKV-{kind.NAME} model, but --version is {c.version}; omit the flag")
    if c.my_pile_stage == 1:
        return version.new_sizes(c, kind)
    if not c.load_model:
        return sizes
    given = version.sizes_given(c, kind)
    if c.load_partial:
        return replace(sizes, **given)
    if c.data_type in char_level.TEXTS and c.vocab_size != sizes.vocab_size:
        raise UserError(
            f"{path}: its vocabulary has {sizes.vocab_size} tokens, but --data_type {c.data_type} uses one of the text's"
            f" {c.vocab_size} characters; convert the text for the model with scripts/convert.py"
        )
    if wrong := [f"--{k} {v}, but it has {getattr(sizes, k)}" for k, v in given.items() if v != getattr(sizes, k)]:
        raise UserError(f"{path}: {'; '.join(wrong)}. Sizes come from the checkpoint: omit these flags")
    return sizes


def build(run: Run) -> RWKV:
    """The model of a run, with its adapter. Seeds the random number generators, so that all ranks
    create the same weights.

    Raises:
        UserError: the checkpoint or the adapter is invalid, or does not match the flags.
    """
    seed_generators(run.flags.random_seed)
    model = load_or_create(run)
    if run.adapter:
        _attach_adapter(model, run, run.adapter)
    elif (dtype := _matrix_dtype(run)) != torch.float32:
        for name, parameter in model.named_parameters():
            if lora.is_matrix(name, parameter.shape):
                parameter.data = parameter.data.to(dtype)
    return model


def seed_generators(seed: int) -> None:
    """Seed Python's, numpy's and torch's random number generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_or_create(run: Run) -> RWKV:
    """The model without adapter: from load_model, or the base that this run created earlier, or a
    new one.
    """
    c = run.flags
    if c.load_model and c.load_partial:
        model = create(c, run.sizes)
        checkpoint.fill(model, checkpoint.read_tensors(c.load_model), c.load_model, partial=True)
        return model
    # a base created by this run is loaded: initialising it again may give other weights (LAPACK,
    # MKL)
    path = c.load_model or run.new_base
    if not path:
        return create(c, run.sizes)
    kind = c.adapter.quantised if c.adapter else None
    model = checkpoint.load_model(path, matrices=_matrix_dtype(run), quantise=kind)
    model.grad_cp, model.dropout = bool(c.grad_cp), c.dropout
    return model


def create(c: TrainConfig, sizes: Sizes) -> RWKV:
    """A new model with upstream's initial weights."""
    model = RWKV(sizes, bool(c.grad_cp), c.dropout)
    model.initialise(emb_scale=c.lr_init, frozen=c.adapter is not None)
    return model


def _matrix_dtype(run: Run) -> torch.dtype:
    """The dtype of matrices that are not quantised: linear layers, embedding and head."""
    trained = not run.adapter
    return torch.bfloat16 if trained and run.flags.optimizer == "adamw8bit" else _frozen_dtype(run)


def _frozen_dtype(run: Run) -> torch.dtype:
    """The dtype of frozen matrices that are not quantised."""
    c = run.flags
    if not c.adapter:
        return torch.float32
    requested = "auto" if c.adapter.quantised else c.adapter.lora_base
    wanted = c.precision if requested == "auto" else requested
    if wanted == "bf16" and not (strategy.is_single_process(c) or run.on_gpu or compat.gloo_supports_bf16()):
        if requested == "bf16":
            raise UserError(
                "--lora_base bf16: ddp on CPUs broadcasts the weights, and gloo in this torch version does not support bf16; omit it to use an fp32"
                " base, or use the modern stack (make venv STACK=modern)"
            )
        return torch.float32
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def _attach_adapter(model: RWKV, run: Run, c: LoRAConfig) -> None:
    """Inject LoRA or the initial state, freeze all other parameters, and load the adapter to
    continue from.
    """
    parts = list(lora.parts_in(c.lora_parts))
    try:
        lora.inject(model, parts, c.lora_r, c.alpha, c.lora_dropout, c.use_dora)
    except ValueError as error:
        raise UserError(f"--lora_parts {c.lora_parts} --lora_r {c.lora_r}: {error}") from error
    lora.mark_trainable(model, parts)
    lora.store_frozen(model, _frozen_dtype(run))
    if c.lora_load:
        # upstream's adapters do not store alpha
        stored = adapter_files.read_manifest(c.lora_load).get("alpha")
        alpha = c.alpha if stored is None else None
        base, digest = (c.load_model, run.base["sha256"]) if c.load_model and run.base else (None, None)
        tensors, known = adapter_files.inspect_adapter(c.lora_load, base, alpha, digest)
        if parts == [state.PART] != known["parts"]:
            raise UserError(
                f"{c.lora_load}: not a tuned state, which has only att.time_state, but a LoRA adapter; continue it with scripts/lora.py --lora_load"
            )
        _check_compatible(model, c, known)
        # parts that the adapter lacks keep their initial values
        adapter_files.load_adapter(model, c.lora_load, tensors, known["parts"])


def adapter_entries(c: LoRAConfig, base: dict[str, str]) -> dict[str, Any]:
    """Manifest entries of an adapter: the base model, parts, and unless it is only an initial
    state, rank and alpha: the output is scaled by alpha / r, also with rsLoRA.
    """
    parts = list(lora.parts_in(c.lora_parts))
    of_lora = {} if parts == [state.PART] else {"r": c.lora_r, "alpha": c.alpha, "use_dora": c.use_dora}
    return {**of_lora, "parts": parts, "base": base["path"], "base_sha256": base["sha256"]}


def _check_compatible(model: RWKV, c: LoRAConfig, known: dict[str, Any]) -> None:
    """Raise UserError if the rank, alpha or parts of a loaded adapter (`known`) do not match the
    flags.
    """
    possible = model.version.PARTS
    theirs, ours = known["parts"], possible.normal(lora.parts_in(c.lora_parts))
    into = ("merge", "--adapter", c.lora_load, "--base", c.load_model, "--output", output("merged.pth"))
    merge = f"merge it into its base and train a new one: {command(*into)}"
    matrices = any(map(possible.layers_of, theirs))  # without them rank and alpha do not matter
    if matrices and known["r"] != c.lora_r:
        raise UserError(
            f"{c.lora_load}: this adapter has rank {known['r']}, but --lora_r is {c.lora_r}; the rank cannot be changed. Use --lora_r {known['r']}, or {merge}"
        )
    if matrices and known["use_dora"] != c.use_dora:
        its, ours_is = ("DoRA", "LoRA") if known["use_dora"] else ("LoRA", "DoRA")
        raise UserError(
            f"{c.lora_load}: this is a {its} adapter, and the run trains {ours_is}; pass --use_dora {str(known['use_dora']).lower()}, or {merge}"
        )
    # messages have 9 digits, which may be passed as a flag
    if matrices and not math.isclose(known["alpha"], c.alpha, rel_tol=1e-7):
        given = f"--lora_alpha is {c.lora_alpha:.9g}" + (f" (with --use_rslora {c.alpha:.9g})" if c.use_rslora else "")
        stored_alpha = known["alpha"] / math.sqrt(c.lora_r) if c.use_rslora else known["alpha"]
        raise UserError(
            f"{c.lora_load}: this adapter was trained with alpha {known['alpha']:.9g}, but {given}, which would scale it by"
            f" {c.alpha / known['alpha'] if known['alpha'] else math.inf:g}. Use --lora_alpha {stored_alpha:.9g}, or {merge}"
        )
    stored, requested = (
        {layer for part in parts for layer in possible.layers_of(part) or (part,)} for parts in (theirs, ours)
    )
    if lost := stored - requested:
        raise UserError(
            f"{c.lora_load}: this adapter has parts that --lora_parts {c.lora_parts} lacks ({', '.join(sorted(lost))}); they would be lost. Use"
            f" --lora_parts {','.join(theirs)} or more, or {merge}"
        )


def write_base(run: Run, model: RWKV) -> dict[str, str]:
    """Save the new base model before the adapter is trained, which is unusable without it. Returns
    its path and SHA-256.
    """
    path = run.folder / NEW_BASE
    checkpoint.save_model(path, model, {"step": 0})
    return {"path": str(path), "sha256": sha256(path)}
