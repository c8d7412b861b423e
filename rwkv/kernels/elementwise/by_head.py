"""Operations on the heads of a time-mix around WKV (RWKV-5 to 7): normalisation with gate, and the
keys of RWKV-7. By CUDA kernels in one pass over memory (formulas: cuda/elementwise/time_mix.h),
otherwise by torch.

Tensors by token are [B, T, C] or [B, T, H, N], all of one dtype; parameters are fp32 [H, N].
"""

import functools
from typing import Any

import torch
from torch import Tensor

from rwkv.kernels.elementwise import native, reference
from rwkv.kernels.elementwise.recompute import checkpointed, recomputed

MAX_SIZE = 64  # TIME_MIX_MAX_N in cuda/: the largest head of these kernels


def kernels(size: int, *tensors: Tensor) -> Any:
    """The CUDA kernels (rwkv.kernels.gpu) for these tensors, with heads of `size` elements; None if
    unavailable, or switched off (gpu.time_mix_enabled).
    """
    return None if size > MAX_SIZE else native.time_mix_kernels(*tensors)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, eps, y, g, weight, bias):
        ctx.run, ctx.eps = run, eps
        ctx.save_for_backward(y, g, weight, bias)
        return run.head_gate_forward([y, g], [weight, bias], eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gout):
        y, g, weight, bias = ctx.saved_tensors
        affine = any(ctx.needs_input_grad[4:])
        found = ctx.run.head_gate_backward(gout.contiguous(), [y, g], [weight, bias], ctx.eps, affine)
        return None, None, found[0], found[1], *(found[2][:2] if affine else (None, None))


def _gated_norm(run: Any, eps: float, *tensors: Tensor) -> Tensor:
    y, g, weight, bias = tensors
    return run.head_gate_forward([y, g], [weight, bias], eps)


def gated_norm(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """norm(y) · silu(g), normalised by head: y [B, T, H, N], g [B, T, A], weight and bias [A] →
    [B, T, A]. Saves y and g.
    """
    run = kernels(y.shape[-1], y, g)
    if run is None:
        return checkpointed(functools.partial(reference.gated_norm, eps), y, g, weight, bias)
    y, g = y.contiguous(), g.contiguous()
    weight, bias = (t.float().contiguous().view(y.shape[2:]) for t in (weight, bias))
    out = _GatedNorm.apply(run, eps, y, g, weight, bias)
    return recomputed(out, functools.partial(_gated_norm, run, eps), y, g, weight, bias)
