"""Upstream's --my_pile_stage: the flags that each stage of pretraining sets.

Stage 1 writes initial weights. Stages 2, 3 and 4 continue from the newest rwkv-N.pth in the folder,
with epochs of 40320 samples and as many epochs as the data has. Stages 2 and 3 use prime sampling,
stage 4 uses random positions.
"""

import dataclasses
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from rwkv import checkpoint
from rwkv.config import TrainConfig
from rwkv.data import offsets
from rwkv.data.binidx import Dataset
from rwkv.errors import UserError
from rwkv.models import RWKV
from rwkv.train import folder as folders
from rwkv.train.console import say
from rwkv.train.resume import run_manifest, state_files
from rwkv.train.run import STAGE_FLAGS, Run
from rwkv.train.runtime.lightning import rank_zero_only
from rwkv.train.setup import create, seed_generators

EPOCH = 40320  # samples; 8!, so divisible by most batch sizes


def apply(c: TrainConfig) -> TrainConfig:
    """Set the flags of stage 2, 3 or 4: load_model, epoch_begin, warmup_steps, magic_prime,
    epoch_steps, epoch_count.

    If the folder contains a run of the same stage, its values are used, so that it can be resumed;
    without a training state it continues from its newest checkpoint.

    Raises:
        UserError: no weights to start from; 40320 is not divisible by the batch size; the data is
            too short for an epoch.
    """
    if not c.my_pile_stage or not c.data_file or c.data_type != "binidx":
        return c
    if c.adapter:
        raise UserError(f"--my_pile_stage {c.my_pile_stage} is for pretraining; omit it for LoRA and state tuning")
    if c.my_pile_stage == 1:
        return c
    folder = c.folder
    previous = None if c.overwrite else run_manifest.read(folder)
    if previous and previous["flags"].get("my_pile_stage") == c.my_pile_stage:
        lost = "" if state_files.states(folder) else folders.describe_loss_of_states(folder, previous)
        if not lost:
            return dataclasses.replace(
                c, **{name: previous["flags"][name] for name in STAGE_FLAGS if name in previous["flags"]}
            )
        say(f"{folder} contains {lost}: the run continues from its newest checkpoint, with a new optimizer")
    batch, size = c.world_size * c.micro_bsz, len(Dataset(c.data_file).tokens) - max(0, c.my_pile_shift)
    if EPOCH % batch:
        near = sorted(
            (n for n in range(1, EPOCH + 1) if EPOCH % n == 0 and n % c.world_size == 0),
            key=lambda n: abs(n - batch),
        )
        advice = (
            f"the nearest --micro_bsz is {near[0] // c.world_size}"
            if near
            else f"no --micro_bsz fits {c.world_size} devices"
        )
        raise UserError(
            f"--my_pile_stage {c.my_pile_stage}: its epochs of {EPOCH} samples are not divisible by the batch size {batch}; {advice}"
        )
    prime = c.magic_prime if c.magic_prime > 0 else offsets.magic_prime(size, c.ctx_len)
    if prime < EPOCH:
        raise UserError(
            f"--my_pile_stage {c.my_pile_stage}: its epochs have {EPOCH} samples, but {c.data_file} has only {max(0, offsets.slots(size, c.ctx_len))}"
            f" contexts of {c.ctx_len} tokens; omit the flag and use --magic_prime -1 with --epoch_steps and --epoch_count"
        )
    number, weights = _newest(folder, only_init=c.overwrite)
    if not weights:
        raise UserError(
            f"--my_pile_stage {c.my_pile_stage}: no rwkv-init.pth or rwkv-N.pth in {folder}; create one with --my_pile_stage 1"
        )
    warmup = c.warmup_steps if c.warmup_steps >= 0 or number < 0 else 10 if c.my_pile_stage == 2 else 30
    values = (str(weights), number + 1, warmup, 0 if c.my_pile_stage == 4 else prime, EPOCH // batch, prime // EPOCH)
    changes: dict[str, Any] = dict(zip(STAGE_FLAGS, values, strict=True))
    return dataclasses.replace(c, **changes)


def write_initial(run: Run) -> Path:
    """Stage 1: write initial weights to rwkv-init.pth; returns its path. Raises UserError if the
    file exists, unless --overwrite is given.
    """
    c, path = run.flags, run.folder / "rwkv-init.pth"
    if path.exists() and not c.overwrite:
        raise UserError(
            f"{path} already exists; continue with --my_pile_stage 2 or 3, or use --overwrite to replace it"
        )
    if c.load_model:  # a whole model of this version, of any size
        tensors = checkpoint.read_tensors(c.load_model)
        checkpoint.check_shapes(tensors, checkpoint.sizes_of(tensors, c.load_model), c.load_model)
    seed_generators(c.random_seed)
    model = create(c, run.sizes)
    if c.load_model:
        _resize_into(model, c.load_model)
    if rank_zero_only.rank == 0:
        checkpoint.save_model(path, model, {"step": 0, "flags": dataclasses.asdict(c)})
    say(
        f"new weights: {path}, L{model.sizes.n_layer} D{model.sizes.n_embd} V{model.sizes.vocab_size}; train them with --my_pile_stage 2 or 3"
    )
    return path


@torch.no_grad()
def _resize_into(model: RWKV, path: str) -> None:
    """Copy a checkpoint into a model of other sizes, with linear interpolation between rows if
    their number differs.

    Raises:
        UserError: the model lacks a tensor, or its rows have another length.
    """
    parameters, tensors = dict(model.named_parameters()), checkpoint.read_tensors(path)
    checkpoint.check_finite(tensors, path)
    for name, tensor in tensors.items():
        if name not in parameters:
            raise UserError(
                f"{path}: a model of these sizes has no {name}; use at least the --n_layer of the checkpoint"
            )
        rows, target = _rows(tensor.float()), _rows(parameters[name])
        if rows.shape[1:] != target.shape[1:]:
            raise UserError(
                f"{path}: {name} is {list(tensor.shape)}, expected {list(parameters[name].shape)}; only vectors and the number of rows can be resized"
            )
        # as upstream: row i of n is at position i·m/n of m
        position = torch.arange(len(target), dtype=torch.float64) * len(rows) / len(target)
        low = position.floor().long().clamp(max=len(rows) - 1)
        part = (position - low).to(rows.dtype).clamp(max=1).view(-1, *[1] * (rows.dim() - 1))
        target.copy_(torch.lerp(rows[low], rows[(low + 1).clamp(max=len(rows) - 1)], part))


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return matrices unchanged, and flatten all other tensors to vectors."""
    return tensor if tensor.squeeze().dim() > 1 else tensor.view(-1)


def _newest(folder: Path, only_init: bool) -> tuple[int, Path | None]:
    """Number and path of the newest checkpoint that is not truncated; the number is -1 for
    rwkv-init.pth, and if there is none.
    """
    found = {
        -1 if match[1] == "init" else int(match[1]): path
        for path in folder.glob("*")
        if (match := re.fullmatch(r"rwkv-(\d+|init)\.pth", path.name))
    }
    for number in sorted(found if not only_init else found.keys() & {-1}, reverse=True):
        if zipfile.is_zipfile(found[number]):
            return number, found[number]
        say(f"warning: {found[number]} is truncated; using the previous one")
    return -1, None
