"""Autograd for the compiled WKV6 kernels (torch.ops.rwkv.wkv6_*)."""

import functools

import torch
from torch import Tensor

from rwkv.kernels.elementwise.native import recompute_of
from rwkv.wkv import autograd
from rwkv.wkv.autograd import Kernels, prepared, refuse_second_derivatives

cpu_kernels = functools.partial(autograd.cpu_kernels, "wkv6")
cuda_kernels = functools.partial(autograd.cuda_kernels, "wkv6")
kernels_for = functools.partial(autograd.kernels_for, "wkv6")

WORK = 15 * 16 * 256  # fp32 of a block, 15 states of a narrow head: WKV6_WORK in cuda/wkv6/wkv6_args.h


def workspace_bytes(heads: int, size: int) -> int:
    """The workspace of the CUDA kernels' backward pass for `heads` heads in all batch rows."""
    return 4 * WORK * heads * (1 if size <= autograd.HEAD_SIZE else size // 16)


class _WKV6(torch.autograd.Function):
    # saves what w is recomputed from, if it has a Recompute
    @staticmethod
    def forward(ctx, kernels, r, w, k, v, u, state, initial, reset, recompute):
        y, last, saved = kernels.forward(r, w, k, v, u, state, initial, reset)
        ctx.kernels, ctx.recompute = kernels, recompute.function
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
        gr, gw, gk, gv, gu, gstate, ginitial = ctx.kernels.backward(r, w, k, v, u, initial, reset, saved, gy, glast)
        if w.dim() == 2:  # a constant decay: by batch row
            gw = gw.sum(0)
        wanted = ctx.needs_input_grad
        gstate, ginitial = gstate if wanted[6] else None, ginitial if wanted[7] else None
        return None, gr, gw, gk, gv, gu.sum(0), gstate, ginitial, None, None


def run(
    kernels: Kernels,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv6` with these kernels; `initial=None` is the empty state."""
    r, k, v = (x.contiguous() for x in (r, k, v))
    w, u = w.float().contiguous(), u.float().contiguous()
    state, reset, initial = prepared(state, reset, initial)
    return _WKV6.apply(kernels, r, w, k, v, u, state, initial, reset, recompute_of(w))


def wkv6(r: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv6` with the kernels for the device of `r`."""
    return run(kernels_for(r), r, *others)  # type: ignore[arg-type]
