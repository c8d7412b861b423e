"""Copies of fp32 weights in bf16, which matmuls in bf16 read instead of casting the weight each
time.

A copy is an attribute of its weight, so no checkpoint contains it. It is valid for a version of the
weight's values and an address; if someone has written the weight since, or replaced its memory, it
is made again before it is used. (Like autograd, this does not notice writes to `weight.data`, nor
those of torch.distributed to a tensor that shares the weight's memory.)
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from rwkv import compat

_NAME = "bf16_copy"


class _Copy:
    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self._key: tuple[int, int] | None = None
        self._source: Tensor | None = None  # the weight's memory: nothing else gets its address

    def current(self, weight: Tensor) -> Tensor:
        """The copy, made again if it is not that of the weight's present values."""
        if self.tensor is None or self._key != _key(weight):
            with torch.no_grad():
                self.memory(weight).copy_(weight)
            self.written(weight)
        return self.memory(weight)

    def memory(self, weight: Tensor) -> Tensor:
        """Where the copy is; whoever writes it then calls `written`."""
        if self.tensor is None or (self.tensor.shape, self.tensor.device) != (weight.shape, weight.device):
            with torch.inference_mode(False):  # else training could not save it for the backward pass
                self.tensor = torch.empty_like(weight, dtype=torch.bfloat16, requires_grad=False)
        return self.tensor

    def written(self, weight: Tensor) -> None:
        self._key, self._source = _key(weight), weight.detach()


def _key(weight: Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()


def _of(weight: Tensor) -> _Copy | None:
    return getattr(weight, _NAME, None)


def keep(weight: Tensor) -> None:
    """Keep a copy of an fp32 weight from now on. It is made when it is first used."""
    setattr(weight, _NAME, _Copy())


def cached(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The copy of a weight, if one is kept and `dtype` is bf16; else the weight."""
    copy = _of(weight) if dtype == torch.bfloat16 else None
    return weight if copy is None else copy.current(weight)


def memory(weight: Tensor) -> Tensor | None:
    """The memory of a weight's copy, for an optimizer that writes both and then calls `written`;
    None if no copy is kept.
    """
    copy = _of(weight)
    return None if copy is None else copy.memory(weight)


def written(weight: Tensor) -> None:
    """The copy of a weight, if one is kept, has been written from its present values."""
    if copy := _of(weight):
        copy.written(weight)


def update(weights: Iterable[Tensor]) -> None:
    """Make those copies again that are not of their weights' present values; before a replay of a
    CUDA graph, which reads copies without `cached`.
    """
    for weight in weights:
        if copy := _of(weight):
            copy.current(weight)


@torch.no_grad()
def refresh(weights: Iterable[Tensor]) -> None:
    """Write the copies of those weights that have one; on GPUs in few kernels (torch 2)."""
    kept = [(copy, weight) for weight in weights if (copy := _of(weight))]
    if kept:
        compat.foreach_copy([copy.memory(weight) for copy, weight in kept], [weight for _, weight in kept])
    for copy, weight in kept:
        copy.written(weight)
