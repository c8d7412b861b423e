"""Autograd for the compiled WKV6 kernels (torch.ops.rwkv.wkv6_*)."""

from collections.abc import Callable

import torch
from torch import Tensor

from rwkv.kernels.elementwise.native import recompute_of
from rwkv.wkv.autograd import HEAD_SIZE, Kernels, in_fp32, prepared, refuse_second_derivatives


def cpu_kernels(r: Tensor) -> Kernels:
    """The CPU kernels, for fp32 and bf16; fp16 is converted."""
    kernels = Kernels(torch.ops.rwkv.wkv6_cpu_forward, torch.ops.rwkv.wkv6_cpu_backward)
    return in_fp32(kernels) if r.dtype == torch.float16 else kernels


def cuda_kernels(r: Tensor, device: int, stream: Callable[[], int]) -> Kernels:
    """The CUDA kernels for inputs like `r`. `stream` returns the stream of each launch."""
    ops = torch.ops.rwkv
    kernels = Kernels(
        lambda *tensors: ops.wkv6_cuda_forward(*tensors, device, stream()),
        lambda *tensors: ops.wkv6_cuda_backward(*tensors, device, stream()),
    )
    return in_fp32(kernels) if r.dtype != torch.float32 and r.shape[-1] > HEAD_SIZE else kernels


def kernels_for(r: Tensor) -> Kernels:
    """The kernels for the device of `r`; on a GPU they run on torch's current stream."""
    if r.device.type == "cpu":
        return cpu_kernels(r)
    device = r.device.index
    return cuda_kernels(r, device, lambda: torch.cuda.current_stream(device).cuda_stream)


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
