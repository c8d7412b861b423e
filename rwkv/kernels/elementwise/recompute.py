"""Tensors that backward passes recompute instead of saving them.

Outputs of cheap operations carry a `Recompute`; an operation that needs such an output in its
backward pass saves the inputs of the Recompute, which are saved anyway, instead of the output. So
matmul inputs and the outputs of norms and WKV are never saved. Any other operation in between drops
the Recompute, and the tensor itself is saved.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recompute:
    """Recomputes a tensor in the backward pass: function(*inputs)."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor | None, ...]


class _Kept:
    """A function whose result is kept from its first call until `release`."""

    def __init__(self, function: Callable[..., Tensor]):
        self._function = function
        self._result: Tensor | None = None

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        if self._result is None:
            self._result = self._function(*inputs)
        return self._result

    def release(self, _: Tensor) -> None:
        self._result = None


def recomputed(
    y: Tensor, function: Callable[..., Tensor], *inputs: Tensor | None, several_uses: bool = False
) -> Tensor:
    """Let backward passes recompute y = function(*inputs). Inputs must not change until then.

    With `several_uses`, y is recomputed once per backward pass: it is kept from its first use until
    the gradient with respect to it is complete, after all its uses. (If y requires no gradient,
    there is no such moment, and each use recomputes it.)
    """
    if torch.is_grad_enabled():
        if several_uses and y.requires_grad:
            function = _Kept(function)
            y.register_hook(function.release)
        y.recompute = Recompute(function, tuple(None if t is None else t.detach() for t in inputs))  # type: ignore[attr-defined]
    return y


def recompute_of(x: Tensor) -> Recompute:
    """The Recompute of x; if it has none, one that saves x itself."""
    return getattr(x, "recompute", None) or Recompute(_passthrough, (x.detach(),))


def _passthrough(x: Tensor) -> Tensor:
    return x


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, sources, saved, *inputs):
        ctx.function, ctx.sources = function, sources
        ctx.save_for_backward(*saved)
        return function(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        wanted = ctx.needs_input_grad[3:]
        inputs = [t if t is None else t.detach() for t in _restore(ctx.sources, ctx.saved_tensors)]
        leaves = [t.requires_grad_() for t, want in zip(inputs, wanted, strict=True) if t is not None and want]
        with torch.enable_grad():
            y = ctx.function(*inputs)
        found = iter(torch.autograd.grad(y, leaves, g))
        return None, None, None, *(next(found) if want else None for want in wanted)


_Sources = list[tuple[Callable[..., Tensor], int]]  # function and number of arguments for each tensor


def _restore(sources: _Sources, saved: Iterable[Tensor | None]) -> list[Tensor | None]:
    rest = iter(saved)
    return [function(*itertools.islice(rest, count)) for function, count in sources]


def _repeat(function: Callable[..., Tensor], sources: _Sources, *saved: Tensor | None) -> Tensor:
    return function(*_restore(sources, saved))


def checkpointed(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """function(*inputs), a few torch operations that are repeated in the backward pass: for their
    gradients, and wherever their result is needed. Saves only what recomputes the inputs.
    """
    kinds = [Recompute(_passthrough, (None,)) if t is None else recompute_of(t) for t in inputs]
    sources, saved = [(kind.function, len(kind.inputs)) for kind in kinds], [t for kind in kinds for t in kind.inputs]
    y = _Checkpointed.apply(function, sources, saved, *inputs)
    return recomputed(y, functools.partial(_repeat, function, sources), *saved)
