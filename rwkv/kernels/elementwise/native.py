"""The elementwise parts of a block, each with its gradient: single passes over memory by the compiled units, torch's operations without them.

What an operation needs again for a gradient is a Recipe of these operations wherever it can be formed from what is kept anyway: inputs of products, outputs
of norms and of WKV are never kept. Parameters are used where they are passed in, in the forward pass of the module that
owns them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv import compat
from rwkv.kernels import gpu, load
from rwkv.kernels.elementwise import eager, reference


@dataclass(frozen=True)
class Recipe:
    """How a tensor is formed again in the backward pass: function(*parts). Not a tuple: DeepSpeed takes those apart."""

    function: Callable[..., Tensor]
    parts: tuple[Tensor | None, ...]


def itself(x: Tensor) -> Recipe:
    """The recipe of what is kept as it is."""
    return Recipe(_itself, (x.detach(),))


def _itself(x: Tensor) -> Tensor:
    return x


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products of x are computed in: autocast's dtype where it is on, else x's own."""
    return compat.autocast_dtype(x.device.type) or x.dtype


def _unit(*tensors: Tensor) -> Any:
    """The operations for tensors like these: compiled on a CPU or an NVIDIA GPU, else by torch (eager.py); None for fp64, which plain.py and
    autograd compute. Why a unit is refused wkv4 says, which stands or falls with it."""
    if any(t.dtype not in _DTYPES for t in tensors):
        return None
    if all(t.is_cuda for t in tensors):
        device = tensors[0].device.index
        return gpu.unit(device) if load.why_unavailable_on(device) is None else eager
    compiled = (
        all(t.device.type == "cpu" and t.dtype != torch.float16 for t in tensors) and load.why_unavailable() is None
    )
    return torch.ops.rwkv if compiled else eager


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Norm(torch.autograd.Function):
    # x comes out again: so the gradient that flows past the norm is added in the same pass.
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        weight = weight.float()
        y, stats = _unit(x).norm_forward(x, weight, bias.float(), eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, stats)
        return y, x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, past):
        x, weight, stats = ctx.saved_tensors
        if gy is None:
            return past, None, None, None, None
        past = None if past is None else past.contiguous()
        gx, gw, gb = _unit(x).norm_backward(gy.contiguous(), past, x, weight, stats, any(ctx.needs_input_grad[1:3]))
        return gx, gw, gb, None, None


def _norm_again(eps: float, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    unit = _unit(x, weight)
    return (
        unit.norm_forward(x, weight, bias, eps, dtype)[0]
        if unit and _fits(x.dtype, dtype)
        else reference.norm(x, weight, bias, eps, dtype)
    )


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Recipe]:
    """LayerNorm of x [..., D] with weight and bias [D], statistics in fp32, the result in x's compute dtype; x, to be used from there on; and the
    recipe of the result.

    Keeps x and 8 bytes a token.
    """
    dtype = compute_dtype(x)
    if _unit(x, weight) is None or not _fits(x.dtype, dtype):
        y = reference.norm(x, weight, bias, eps, dtype)
    else:
        y, x = _Norm.apply(x.contiguous(), weight, bias, eps, dtype)
    if not torch.is_grad_enabled():  # nothing will be formed again
        return y, x, itself(y)
    # copies of the parameters: ZeRO-3 has them here, and perhaps not where the recipe is followed
    copies = (reference.wide(t.detach()).clone() for t in (weight, bias))
    return y, x, Recipe(functools.partial(_norm_again, eps, dtype), (x.detach(), *copies))


def _fits(stream: torch.dtype, inside: torch.dtype) -> bool:
    """Whether a residual stream of this dtype goes with this one inside the blocks."""
    return stream in (inside, torch.float32)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, last, reset, weights, again):
        wanted = ctx.needs_input_grad[3]  # x is needed for the gradient of the weights alone
        ctx.again = again.function if wanted else None
        ctx.save_for_backward(last, reset, weights, *(again.parts if wanted else ()))
        return tuple(_unit(x).mix_forward(x, last, reset, weights))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gy):
        last, reset, weights, *kept = ctx.saved_tensors
        whole = [g.contiguous() for g in gy]
        x = ctx.again(*kept) if ctx.again else whole[0]
        gx, glast, gweights = _unit(whole[0]).mix_backward(whole, x, last, reset, weights, ctx.again is not None)
        return gx, glast if ctx.needs_input_grad[1] else None, None, gweights, None


def _mix_again(
    again: Callable[..., Tensor], last: Tensor, reset: Tensor | None, weights: Tensor, *parts: Tensor
) -> Tensor:
    x = again(*parts)
    unit = _unit(x)
    return (unit.mix_forward(x, last, reset, weights) if unit else reference.mix(x, last, reset, weights))[0]


def mix(
    x: Tensor, last: Tensor, reset: Tensor | None, weights: list[Tensor], again: Recipe | None = None
) -> list[tuple[Tensor, Recipe]]:
    """Token shift: m·x + (1 − m)·(the token before) for each m of `weights`, up to three of D numbers each, with the recipe for it.

    x [B, T, D]; `last` [B, D] is the token before the first; reset [B, T] bool or None: where it is True there is none before. Keeps what `again` forms x
    from, x without one.
    """
    stacked = torch.cat([m.reshape(1, -1) for m in weights])
    last = last.to(x.dtype).contiguous()
    x = x.contiguous() if _unit(x) else x
    again = again or itself(x)
    if _unit(x):
        stacked = stacked.float()
        made = _Mix.apply(x, last, reset, stacked, again)
    else:
        made = reference.mix(x, last, reset, stacked)
    function, rows = functools.partial(_mix_again, again.function), stacked.detach().split(1)
    return [(y, Recipe(function, (last.detach(), reset, m, *again.parts))) for y, m in zip(made, rows, strict=True)]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, v, past, again):
        ctx.again = again.function
        ctx.save_for_backward(r, *again.parts)
        return _unit(r).gate_forward(past, r, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        r, *kept = ctx.saved_tensors
        gr, gv = _unit(r).gate_backward(g.contiguous(), r, ctx.again(*kept).contiguous())
        return gr, gv, g if ctx.needs_input_grad[2] else None, None


def _gate_again(again: Callable[..., Tensor], r: Tensor, *parts: Tensor) -> Tensor:
    v, unit = again(*parts), _unit(r)
    return unit.gate_forward(None, r, v.contiguous()) if unit else reference.gate(r, v)


def gate(r: Tensor, v: Tensor, again: Recipe | None = None) -> tuple[Tensor, Recipe]:
    """σ(r)·v of two tensors alike, with the recipe for it. Keeps r and what `again` forms v from, v without one."""
    again = again or itself(v)
    y = _Gate.apply(r.contiguous(), v.contiguous(), None, again) if _unit(r, v) else reference.gate(r, v)
    return y, Recipe(functools.partial(_gate_again, again.function), (r.detach(), *again.parts))


def gate_onto(past: Tensor, r: Tensor, v: Tensor) -> Tensor:
    """past + σ(r)·v, in past's dtype. Keeps r and v."""
    if _unit(past, r, v) is None or not _fits(past.dtype, r.dtype):
        return reference.gate(r, v, past)
    return _Gate.apply(r.contiguous(), v.contiguous(), past.contiguous(), itself(v))


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k):
        ctx.save_for_backward(k)
        return _unit(k).relu2_forward(k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (k,) = ctx.saved_tensors
        return _unit(k).relu2_backward(g.contiguous(), k)


def _relu2_again(k: Tensor) -> Tensor:
    unit = _unit(k)
    return unit.relu2_forward(k) if unit else reference.relu2(k)


def relu2(k: Tensor) -> tuple[Tensor, Recipe]:
    """max(k, 0)², with the recipe for it. Keeps k."""
    return _Relu2.apply(k.contiguous()) if _unit(k) else reference.relu2(k), Recipe(_relu2_again, (k.detach(),))


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.seed, ctx.p = new_seed(), p
        return dropout(x, ctx.seed, p)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return dropout(g, ctx.seed, ctx.p), None


def drop(x: Tensor, p: float) -> Tensor:
    """x / (1 − p), or 0 with probability p. Keeps nothing."""
    return _Drop.apply(x, p)


def new_seed() -> int:
    """For dropout: of the CPU's generator, which gradient checkpointing puts back, so that it draws the same again."""
    return int(torch.randint(1 << 31, ()))


def dropout(x: Tensor, seed: int, p: float) -> Tensor:
    """x / (1 − p), or 0 with probability p, by a hash of the element's number and the seed (plain.dropout): no mask is kept. No gradient."""
    unit = _unit(x)
    return unit.dropout(x.contiguous(), seed, p) if unit else reference.dropout(x, seed, p)


def dropout_onto(y: Tensor, x: Tensor, seed: int, p: float) -> None:
    """y += dropout(x), in place, on contiguous tensors alike. No gradient."""
    unit = _unit(y)
    if unit:
        unit.dropout_add(y, x.contiguous(), seed, p)
    else:
        y += reference.dropout(x, seed, p)


def softmax_gradient(logits: Tensor, targets: Tensor, pull: float, want: bool) -> Tensor:
    """Σ over tokens of the cross-entropy of logits [N, V] at targets [N], fp32. With `want` the logits become its gradient, in place, with
    pull · max added at each token's largest logit (the first of several)."""
    top, total, at_target = (_unit(logits) or eager).loss(logits, targets.contiguous(), pull, want).unbind(1)
    return (total.log() + top - at_target).sum()
