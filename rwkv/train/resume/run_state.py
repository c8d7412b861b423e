"""All that a run is at an optimizer step, whatever its strategy: with it the run goes on as if it had never stopped.

`capture` and `restore` are the seam between this form, in which every weight stands once and whole under its name, and what a strategy
makes of it in memory. Both are called by every rank.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rwkv.train.loop.module import TrainingModule
from rwkv.train.runtime import zero
from rwkv.train.runtime.lightning import pl

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
        weights=zero.weights(trained, optimizer, module.device),
        optimizer=zero.optimizer_state(trained, optimizer, module.device),
        scaler=scaler.state_dict() if scaler else zero.scaler(optimizer),
        rng=_gathered(_rng(module.device)),
        run=run,
    )


def restore(trainer: pl.Trainer, module: TrainingModule, state: State | None) -> None:
    """Put a state back, rank 0's into every rank, and use it up; called once the strategy has set up model and optimizer.

    Where there are more ranks than there were, the further ones keep their own random numbers.
    """
    state, take = _shared(state, module.device)
    zero.put_back(_trained(module), trainer.optimizers[0], take, state.scaler)
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
        return (
            tensors[shell["tensor"]]
            if shell.keys() == {"tensor"}
            else {key: join(inside, tensors) for key, inside in shell.items()}
        )
    return [join(inside, tensors) for inside in shell] if isinstance(shell, list) else shell


def _shared(state: State | None, device: torch.device) -> tuple[State, zero.Take]:
    """Rank 0's state on every rank but for weights and optimizer, and what hands out those, one parameter at a time, and lets them go, so that no rank
    holds more than one that it has no use for. Ranks need no file of their own."""

    def mine(name: str) -> dict[str, Any]:
        return {"weight": state.weights.pop(name), **state.optimizer.pop(name, {})} if state else {}

    if state and (not dist.is_initialized() or dist.get_world_size() == 1):
        return state, mine
    told: list[Any] = [None]
    if state:  # rank 0's
        kept = {name: {"weight": weight, **state.optimizer.get(name, {})} for name, weight in state.weights.items()}
        told = [
            (
                replace(state, weights={}, optimizer={}),
                {name: {key: _Like.of(x) for key, x in of.items()} for name, of in kept.items()},
            )
        ]
        del kept
    dist.broadcast_object_list(told, src=0, device=device if device.type == "cuda" else None)
    rest, described = told[0]

    def take(name: str) -> dict[str, Any]:
        found = mine(name)
        for key, like in described[name].items():
            if isinstance(like, _Like):
                found[key] = (
                    found[key].to(device) if state else torch.empty(like.shape, dtype=like.dtype, device=device)
                )
                dist.broadcast(found[key], src=0)
            else:
                found[key] = like
        return found

    return rest, take


@dataclass(frozen=True)
class _Like:
    """What a tensor is like."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Any) -> Any:
        return cls(x.shape, x.dtype) if isinstance(x, Tensor) else x
