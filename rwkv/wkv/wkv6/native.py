"""Autograd for the compiled WKV6 kernels (torch.ops.rwkv.wkv6_*)."""

from typing import Any

import torch
from torch import Tensor

from rwkv.kernels.elementwise.native import recompute_of
from rwkv.wkv.autograd import prepared, refuse_second_derivatives


def forward(*tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """forward(r, w, k, v, u, state, initial, reset) -> (y, state, saved states); None for a state:
    zeros.
    """
    return torch.ops.rwkv.wkv6_cpu_forward(*tensors)


def backward(*tensors: Tensor | None) -> Any:
    """backward(r, w, k, v, u, initial, reset, saved states, gy, gstate) -> gradients of r, w, k, v,
    u, state and initial.
    """
    gr, gw, gk, gv, gu, gstate, ginitial = torch.ops.rwkv.wkv6_cpu_backward(*tensors)
    if gw.dim() == 3:  # of a constant decay, by batch row
        gw = gw.sum(0)
    return gr, gw, gk, gv, gu.sum(0), gstate, ginitial


class _WKV6(torch.autograd.Function):
    # saves what w is recomputed from, if it has a Recompute
    @staticmethod
    def forward(ctx, r, w, k, v, u, state, initial, reset, recompute):
        y, last, saved = forward(r, w, k, v, u, state, initial, reset)
        ctx.recompute = recompute.function
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(r, k, v, u, initial, reset, saved, *recompute.inputs)
        return y, last

    @staticmethod
    def backward(ctx, gy, glast):
        refuse_second_derivatives("wkv6")
        r, k, v, u, initial, reset, saved, *inputs = ctx.saved_tensors
        w = ctx.recompute(*inputs)
        gy = torch.zeros_like(r) if gy is None else gy.contiguous()
        glast = None if glast is None else glast.contiguous()
        *grads, gstate, ginitial = backward(r, w, k, v, u, initial, reset, saved, gy, glast)
        wanted = ctx.needs_input_grad
        return *grads, gstate if wanted[5] else None, ginitial if wanted[6] else None, None, None


def wkv6_cpu(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv6` for CPU tensors; fp16 is converted to fp32 and back. `initial=None` is the
    empty state.
    """
    dtype = r.dtype
    r, k, v = ((x.float() if dtype == torch.float16 else x).contiguous() for x in (r, k, v))
    w, u = w.float().contiguous(), u.float().contiguous()
    state, reset, initial = prepared(state, reset, initial)
    y, last = _WKV6.apply(r, w, k, v, u, state, initial, reset, recompute_of(w))
    return y.to(dtype), last
