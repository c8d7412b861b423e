"""All that a run is at an optimizer step, whatever its strategy: with it the run goes on as if it had never stopped.

`capture` and `restore` are the seam between this form, in which every weight stands once and whole under its name, and what a strategy
makes of it in memory. Both are called by every rank.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from rwkv.train import sharded
from rwkv.train.module import TrainingModule

FORMAT = 1  # of the file; a later one is refused by name


@dataclass
class State:
    """A run between two optimizer steps. Everything in it is a tensor, a number, a string, or a list or dictionary of these.

    Attributes:
        step: optimizer steps made, from epoch 0.
        samples: samples taken, from epoch 0, over all ranks: where the data goes on.
        weights: of what trains, by name, in the precision that the optimizer keeps them in.
        optimizer: its state of each of them, by name: `step`, `exp_avg`, `exp_avg_sq`.
        scaler: of the loss, in fp16; else empty.
        rng: of every rank: torch, its GPU, numpy, Python.
        run: the run's manifest: flags and what it was made from.
    """

    step: int
    samples: int
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]
    scaler: dict[str, Any]
    rng: list[dict[str, Any]]
    run: dict[str, Any]


def capture(trainer: pl.Trainer, module: TrainingModule, run: dict[str, Any]) -> State:
    """The run as it is now. Weights and optimizer state are not copied: write them before the next step. Rank 0's is complete."""
    optimizer, trained = trainer.optimizers[0], _trained(module)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return State(
        step=module.step,
        samples=module.samples,
        weights=sharded.weights(trained, optimizer, module.device),
        optimizer=sharded.optimizer_state(trained, optimizer, module.device),
        scaler=scaler.state_dict() if scaler else sharded.scaler(optimizer),
        rng=_gathered(_rng(module.device)),
        run=run,
    )


def restore(trainer: pl.Trainer, module: TrainingModule, state: State | None) -> None:
    """Put a state back, rank 0's into every rank; called once the strategy has set up model and optimizer.

    Where there are more ranks than there were, the further ones keep their own random numbers.
    """
    state = _shared(state, module.device)
    optimizer = trainer.optimizers[0]
    sharded.put_back(_trained(module), optimizer, state.weights, state.optimizer, state.scaler)
    if state.scaler and getattr(trainer.precision_plugin, "scaler", None):
        trainer.precision_plugin.scaler.load_state_dict(state.scaler)
    if trainer.global_rank < len(state.rng):
        _set_rng(state.rng[trainer.global_rank], module.device)


def _trained(module: TrainingModule) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module.model.named_parameters() if parameter.requires_grad}


def _rng(device: torch.device) -> dict[str, Any]:
    version, words, gauss = random.getstate()
    drawn: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = drawn
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(words), gauss],
    }


def _set_rng(rng: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(rng["torch"])
    if device.type == "cuda" and rng["cuda"] is not None:
        torch.cuda.set_rng_state(rng["cuda"], device)
    kind, keys, *rest = rng["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words), gauss))


def _gathered(mine: dict[str, Any]) -> list[dict[str, Any]]:
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def split(value: Any) -> tuple[Any, list[Tensor]]:
    """A value as what JSON can hold, and its tensors: {"tensor": i} stands for the i-th. Tuples become lists."""
    tensors: list[Tensor] = []

    def walk(x: Any) -> Any:
        if isinstance(x, Tensor):
            tensors.append(x)
            return {"tensor": len(tensors) - 1}
        if isinstance(x, dict):
            return {key: walk(inside) for key, inside in x.items()}
        return [walk(inside) for inside in x] if isinstance(x, list | tuple) else x

    return walk(value), tensors


def join(shell: Any, tensors: Sequence[Tensor]) -> Any:
    """What `split` took apart."""
    if isinstance(shell, dict):
        return tensors[shell["tensor"]] if shell.keys() == {"tensor"} else {key: join(inside, tensors) for key, inside in shell.items()}
    return [join(inside, tensors) for inside in shell] if isinstance(shell, list) else shell


def _shared(state: State | None, device: torch.device) -> State:
    """Rank 0's state on every rank, on the CPU. Ranks need no file of their own, and tensors travel one at a time."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert state is not None
        return state
    first = dist.get_rank() == 0
    shell, tensors = split(vars(state)) if first else (None, [])
    told: list[Any] = [shell, [(x.shape, x.dtype) for x in tensors]]
    dist.broadcast_object_list(told, src=0, device=device if device.type == "cuda" else None)
    for i, (shape, dtype) in enumerate(told[1]):
        tensor = tensors[i].to(device) if first else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(tensor, src=0)
        if not first:
            tensors.append(tensor.cpu())
    return State(**join(told[0], tensors))
