"""Elementwise operations of a block with their gradients: single passes over memory by the compiled kernels, else by
torch (reference.py) and autograd.

To save memory, a gradient recomputes cheap tensors: outputs of these operations carry a `Recompute`, and an operation
that needs such an output in its backward pass saves what the Recompute needs, which is saved anyway, instead of the
output itself. So matmul inputs and the outputs of norms and WKV are never saved. Any operation in between drops the
Recompute, and the tensor itself is saved.

Parameters are used where they are passed in, in the forward pass of the module that owns them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv import compat
from rwkv.kernels import gpu, load
from rwkv.kernels.elementwise import reference


@dataclass(frozen=True)
class Recompute:
    """How a tensor is recomputed in a backward pass: function(*inputs)."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor | None, ...]


def recomputed(y: Tensor, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """y = function(*inputs), marked so that gradients recompute it from the inputs. They must not change until then."""
    if torch.is_grad_enabled():
        y.recompute = Recompute(function, tuple(None if t is None else t.detach() for t in inputs))  # type: ignore[attr-defined]
    return y


def recompute_of(x: Tensor) -> Recompute:
    """How x is recomputed; x itself where it carries no Recompute."""
    return getattr(x, "recompute", None) or Recompute(_passthrough, (x.detach(),))


def _passthrough(x: Tensor) -> Tensor:
    return x


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matmuls of x are computed in: autocast's where it is on, else x's own."""
    return compat.autocast_dtype(x.device.type) or x.dtype


def _kernels(*tensors: Tensor) -> Any:
    """The compiled operations for tensors like these, on a CPU or an NVIDIA GPU; None where there are none, e.g. for fp64.

    `wkv4` reports why the kernels are unavailable: all are in the same library.
    """
    if any(t.dtype not in _DTYPES for t in tensors):
        return None
    if all(t.is_cuda for t in tensors):
        device = tensors[0].device.index
        return gpu.unit(device) if load.why_unavailable_on(device) is None else None
    if any(t.device.type != "cpu" or t.dtype == torch.float16 for t in tensors) or load.why_unavailable():
        return None
    return torch.ops.rwkv


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        weight = weight.float()
        y, stats = _kernels(x).norm_forward(x, weight, bias.float(), eps, dtype)
        ctx.save_for_backward(x, weight, stats)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        x, weight, stats = ctx.saved_tensors
        affine = any(ctx.needs_input_grad[1:3])
        return *_kernels(x).norm_backward(gy.contiguous(), x, weight, stats, affine), None, None


def _norm(eps: float, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _kernels(x).norm_forward(x, weight, bias, eps, dtype)[0]


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x [..., D] with weight and bias [D] and fp32 statistics; the result is in x's compute dtype.

    Saves x and 8 bytes per token.
    """
    dtype = compute_dtype(x)
    if _kernels(x, weight) is None or x.dtype not in (dtype, torch.float32):
        return reference.norm(x, weight, bias, eps, dtype)
    x = x.contiguous()
    y = _Norm.apply(x, weight, bias, eps, dtype)
    # copies of the parameters: ZeRO-3 has them gathered here, and perhaps not where y is recomputed
    copies = (t.detach().float().clone() for t in (weight, bias))
    return recomputed(y, functools.partial(_norm, eps, dtype), x, *copies)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, last, initial, reset, weights, again):
        trained = ctx.needs_input_grad[4]  # x is needed for the gradient of the weights alone
        ctx.again = again.function if trained else None
        ctx.save_for_backward(last, initial, reset, weights, *(again.inputs if trained else ()))
        return tuple(_kernels(x).mix_forward(x, last, initial, reset, weights))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gy):
        last, initial, reset, weights, *inputs = ctx.saved_tensors
        grads = [g.contiguous() for g in gy]
        x = ctx.again(*inputs) if ctx.again else grads[0]
        backward = _kernels(grads[0]).mix_backward
        gx, glast, gweights = backward(grads, x, last, initial, reset, weights, ctx.again is not None)
        ginitial = None
        if ctx.needs_input_grad[2] and reset is not None:
            starts = (g.masked_fill(~reset[..., None], 0).sum(1, dtype=torch.float32) for g in grads)
            ginitial = sum((1 - m) * g for m, g in zip(weights, starts, strict=True)).to(initial.dtype)
        return gx, glast if ctx.needs_input_grad[1] else None, ginitial, None, gweights, None


def _mix(
    again: Callable[..., Tensor],
    last: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    weights: Tensor,
    *inputs: Tensor | None,
) -> Tensor:
    x = again(*inputs)
    return _kernels(x).mix_forward(x, last, initial, reset, weights)[0]


def mix(
    x: Tensor, last: Tensor, reset: Tensor | None, weights: list[Tensor], initial: Tensor | None = None
) -> list[Tensor]:
    """Token shift: m·x + (1 − m)·(the token before) for each m of `weights`, up to three with D elements each.

    x [B, T, D]; `last` [B, D] is the token before the first; reset [B, T] bool or None: where it is True the token
    before is `initial` [B, D], by default `last`. Saves x.
    """
    stacked = torch.cat([m.reshape(1, -1) for m in weights])
    last = last.to(x.dtype).contiguous()
    initial = last if initial is None else initial.to(x.dtype).contiguous()
    if _kernels(x) is None:
        return reference.mix(x, last, initial, reset, stacked)
    again, stacked = recompute_of(x), stacked.float()
    mixed = _Mix.apply(x.contiguous(), last, initial, reset, stacked, again)
    function = functools.partial(_mix, again.function)
    return [
        recomputed(y, function, last, initial, reset, m, *again.inputs)
        for y, m in zip(mixed, stacked.detach().split(1), strict=True)
    ]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, v, again):
        ctx.again = again.function
        ctx.save_for_backward(r, *again.inputs)
        return _kernels(r).gate_forward(r, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        r, *inputs = ctx.saved_tensors
        return *_kernels(r).gate_backward(g.contiguous(), r, ctx.again(*inputs).contiguous()), None


def _gate(again: Callable[..., Tensor], r: Tensor, *inputs: Tensor | None) -> Tensor:
    return _kernels(r).gate_forward(r, again(*inputs).contiguous())


def gate(r: Tensor, v: Tensor) -> Tensor:
    """σ(r)·v of two tensors of one shape and dtype. Saves r and v."""
    if _kernels(r, v) is None:
        return reference.gate(r, v)
    r, again = r.contiguous(), recompute_of(v)
    y = _Gate.apply(r, v.contiguous(), again)
    return recomputed(y, functools.partial(_gate, again.function), r, *again.inputs)


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k):
        ctx.save_for_backward(k)
        return _kernels(k).relu2_forward(k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (k,) = ctx.saved_tensors
        return _kernels(k).relu2_backward(g.contiguous(), k)


def _relu2(k: Tensor) -> Tensor:
    return _kernels(k).relu2_forward(k)


def relu2(k: Tensor) -> Tensor:
    """max(k, 0)². Saves k."""
    if _kernels(k) is None:
        return reference.relu2(k)
    k = k.contiguous()
    return recomputed(_Relu2.apply(k), _relu2, k)


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
    """x / (1 − p), or 0 with probability p. Saves nothing."""
    return _Drop.apply(x, p)


def new_seed() -> int:
    """A seed for dropout from the CPU's generator, which gradient checkpointing restores, so that it draws the same again."""
    return int(torch.randint(1 << 31, ()))


def dropout(x: Tensor, seed: int, p: float) -> Tensor:
    """x / (1 − p), or 0 with probability p, by a hash of the element's index and the seed (reference.dropout), so that no
    mask is saved. No gradient."""
    kernels = _kernels(x)
    return kernels.dropout(x.contiguous(), seed, p) if kernels else reference.dropout(x, seed, p)


def dropout_add_(y: Tensor, x: Tensor, seed: int, p: float) -> None:
    """y += dropout(x), in place, on contiguous tensors of one shape and dtype. No gradient."""
    kernels = _kernels(y)
    if kernels:
        kernels.dropout_add(y, x.contiguous(), seed, p)
    else:
        y += reference.dropout(x, seed, p)


def softmax_gradient(logits: Tensor, targets: Tensor, pull: float, want: bool) -> Tensor:
    """Σ over tokens of the cross-entropy of logits [N, V] at targets [N], fp32. With `want` the logits are overwritten with
    its gradient, with pull · max added at each token's largest logit (the first of several)."""
    kernels = _kernels(logits)
    if kernels:
        stats = kernels.loss(logits, targets.contiguous(), pull, want)
    else:
        stats, gradient = reference.softmax(logits, targets, pull)
        if want:
            logits.copy_(gradient)
    top, total, at_target = stats.unbind(1)
    return (total.log() + top - at_target).sum()
