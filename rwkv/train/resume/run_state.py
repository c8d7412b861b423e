"""The training state between two optimizer steps, independent of the parallel strategy. A resumed
run gives the same results as an uninterrupted one.

`capture` converts from the strategy's (possibly sharded) tensors to full tensors by name, `restore`
converts back. Both are collective operations.
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

FORMAT = 1  # version of the file format; files of later versions are rejected


@dataclass
class State:
    """A training state. Consists of tensors, numbers, strings, and lists and dictionaries of these.

    Attributes:
        step: completed optimizer steps, counted from epoch 0.
        samples: samples used so far over all ranks, counted from epoch 0; data reading resumes
            there.
        weights: trained parameters by name, in the optimizer's precision.
        optimizer: optimizer state by parameter name, e.g. `step`, `exp_avg`, `exp_avg_sq`.
        scaler: state of the loss scaler in fp16; else empty.
        rng: random number generator states of every rank: torch, CUDA, numpy, Python.
        run: the run's manifest.
    """

    step: int
    samples: int
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]
    scaler: dict[str, Any]
    rng: list[dict[str, Any]]
    run: dict[str, Any]


def capture(trainer: pl.Trainer, module: TrainingModule, run: dict[str, Any]) -> State:
    """Capture the current training state; complete on rank 0. Weights and optimizer state are not
    copied, so write the state before the next step.
    """
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
    """Restore rank 0's state on all ranks, after the strategy has set up model and optimizer.
    Tensors are removed from `state` to free memory.

    Additional ranks, which the state has no random number generator state for, keep their own.
    """
    state, fetch = _broadcast(state, module.device)
    zero.restore(_trained(module), trainer.optimizers[0], fetch, state.scaler)
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
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    return states


def split(value: Any) -> tuple[Any, list[Tensor]]:
    """Separate a nested value into a JSON-serialisable part and a list of tensors: the i-th is
    replaced by {"tensor": i}. Tuples become lists.
    """
    tensors: list[Tensor] = []

    def walk(x: Any) -> Any:
        if isinstance(x, Tensor):
            tensors.append(x)
            return {"tensor": len(tensors) - 1}
        if isinstance(x, dict):
            return {key: walk(inside) for key, inside in x.items()}
        return [walk(inside) for inside in x] if isinstance(x, list | tuple) else x

    return walk(value), tensors


def join(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Inverse of `split`."""
    if isinstance(value, dict):
        return (
            tensors[value["tensor"]]
            if value.keys() == {"tensor"}
            else {key: join(inside, tensors) for key, inside in value.items()}
        )
    return [join(inside, tensors) for inside in value] if isinstance(value, list) else value


def _broadcast(state: State | None, device: torch.device) -> tuple[State, zero.Fetch]:
    """Broadcast rank 0's state: returns it without weights and optimizer state, and a function that
    broadcasts these for one parameter at a time, so that each rank holds only one in addition to
    its own.
    """

    def pop(name: str) -> dict[str, Any]:
        return {"weight": state.weights.pop(name), **state.optimizer.pop(name, {})} if state else {}

    if state and (not dist.is_initialized() or dist.get_world_size() == 1):
        return state, pop
    message: list[Any] = [None]
    if state:  # on rank 0
        tensors = {name: {"weight": weight, **state.optimizer.get(name, {})} for name, weight in state.weights.items()}
        message = [
            (
                replace(state, weights={}, optimizer={}),
                {name: {key: _Like.of(x) for key, x in of.items()} for name, of in tensors.items()},
            )
        ]
        del tensors
    dist.broadcast_object_list(message, src=0, device=device if device.type == "cuda" else None)
    rest, described = message[0]

    def fetch(name: str) -> dict[str, Any]:
        found = pop(name)
        for key, like in described[name].items():
            if isinstance(like, _Like):
                found[key] = (
                    found[key].to(device) if state else torch.empty(like.shape, dtype=like.dtype, device=device)
                )
                dist.broadcast(found[key], src=0)
            else:
                found[key] = like
        return found

    return rest, fetch


@dataclass(frozen=True)
class _Like:
    """Shape and dtype of a tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Any) -> Any:
        return cls(x.shape, x.dtype) if isinstance(x, Tensor) else x
