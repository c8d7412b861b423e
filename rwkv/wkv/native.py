"""Autograd over the compiled CPU unit (torch.ops.rwkv.wkv4_*)."""

import functools
import math

import torch
from torch import Tensor

from rwkv.wkv import build, reference


@functools.lru_cache(maxsize=1)
def refusal() -> str | None:
    """Load the compiled unit once; why it cannot be used, or None."""
    reason = build.refusal()
    if reason is None:
        try:
            torch.ops.load_library(str(build.library()))
        except OSError as error:
            return f"it does not load ({error}); run: make kernels"
    return reason


class _WKV4(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, u, k, v, state, reset):
        y, last, kept = torch.ops.rwkv.wkv4_forward(w, u, k, v, state, reset)
        ctx.save_for_backward(w, u, k, v, reset, kept)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, glast):
        w, u, k, v, reset, kept = ctx.saved_tensors
        gw, gu, gk, gv, gstate = torch.ops.rwkv.wkv4_backward(w, u, k, v, reset, kept, gy.contiguous(), glast.contiguous())
        return gw, gu, gk, gv, gstate if ctx.needs_input_grad[4] else None, None


def wkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `rwkv.wkv.wkv4`, on CPU tensors; arithmetic and saved tensors are fp32."""
    as_fp32 = [x.float().contiguous() for x in (w, u, k, v)]
    if not math.isfinite(sum(float(x.detach().sum()) for x in as_fp32)):  # -ffast-math would hide a NaN; the loop passes it on
        return reference.wkv4(w, u, k, v, state, reset)
    y, last = _WKV4.apply(*as_fp32, None if state is None else state.float().contiguous(), None if reset is None else reset.contiguous())
    return y.to(k.dtype), last
