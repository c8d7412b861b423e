"""Autograd for the compiled WKV6 kernels (torch.ops.rwkv.wkv6_*)."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv.kernels.elementwise.recompute import recompute_of
from rwkv.wkv import autograd
from rwkv.wkv.autograd import Kernels, prepared, refuse_second_derivatives

cpu_kernels = functools.partial(autograd.cpu_kernels, "wkv6")

SAVE_INTERVAL = 64  # tokens per saved state: WKV6_SAVE_INTERVAL in cuda/wkv6/wkv6_args.h
BLOCKS = 512  # of a launch: several for each multiprocessor of a large GPU
WORK = 15 * 16 * 256  # fp32 of a block, 15 states of a narrow head: WKV6_WORK in cuda/wkv6/wkv6_args.h


def blocks_per_head(size: int) -> int:
    """Blocks of the CUDA kernels for each head, or each segment of it."""
    return 1 if size <= autograd.HEAD_SIZE else size // 16


def workspace_bytes(heads: int, size: int) -> int:
    """The workspace of the CUDA kernels' backward pass for `heads` heads in all batch rows, each
    one segment; of several segments, for each of them.
    """
    return 4 * WORK * heads * blocks_per_head(size)


def segment_length(heads: int, size: int, length: int) -> int:
    """Tokens per segment of the kernels by chunks, for `heads` heads in all batch rows: about
    BLOCKS blocks in all, but at least 64 tokens each. It depends on the shape only, so that results
    are reproducible.
    """
    segments = max(1, BLOCKS // max(1, heads * blocks_per_head(size)))
    return -(-length // (segments * SAVE_INTERVAL)) * SAVE_INTERVAL


def cuda_kernels(r: Tensor, device: int, stream: Callable[[], int], segment: int = 0) -> Kernels:
    """The CUDA kernels for inputs like `r`, with segments of so many tokens, a multiple of 64, in
    parallel; 0: each head token by token. `stream` returns the stream of each launch. The saved
    states are the same up to rounding, so either backward fits either forward.
    """
    return autograd.cuda_kernels("wkv6", r, device, stream, segment)


def kernels_for(r: Tensor) -> Kernels:
    """The kernels for the device of `r`, on a GPU token by token and on torch's current stream."""
    return autograd.kernels_for("wkv6", r, 0)


def chunk_kernels_for(r: Tensor) -> Kernels:
    """The CUDA kernels parallel over time, for the GPU of `r`, on torch's current stream."""
    batch, length, heads, size = r.shape
    return autograd.kernels_for("wkv6", r, segment_length(batch * heads, size, length))


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


def wkv6_chunk(r: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv6` with the CUDA kernels parallel over time."""
    return run(chunk_kernels_for(r), r, *others)  # type: ignore[arg-type]
