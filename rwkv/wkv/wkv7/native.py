"""Autograd for the compiled WKV7 kernels (torch.ops.rwkv.wkv7_*)."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv.kernels.gpu import current_stream
from rwkv.wkv import autograd
from rwkv.wkv.autograd import Kernels, prepared, refuse_second_derivatives

cpu_kernels = functools.partial(autograd.cpu_kernels, "wkv7")
cuda_kernels = functools.partial(autograd.cuda_kernels, "wkv7")
kernels_for = functools.partial(autograd.kernels_for, "wkv7")


def workspace_bytes(heads: int, size: int) -> int:
    """The workspace of the CUDA kernels token by token in the backward pass, for `heads` heads in
    all batch rows: states between two saved ones (wkv7_work_floats in cuda/wkv7/wkv7_args.h).
    """
    width = next(width for width in (64, 128, 256) if size <= width)
    rows = 64 if width == 64 else 32  # of a block
    states = 16 // (256 // width) - 1
    return 4 * states * width * rows * heads * -(-size // rows)


def slice_length(heads: int) -> int:
    """Chunks of each sequence per launch of the kernels by chunks, for `heads` heads in all batch
    rows: as few as fill a GPU, since they take 26 KB of workspace per chunk and head (42 KB
    backward).
    """
    return max(4, 8192 // max(1, heads))


def cuda_chunk_kernels(device: int, stream: Callable[[], int], slice_length: int) -> Kernels:
    """The CUDA kernels that compute chunks of 16 tokens by matrix products, for heads of 64. They
    save the same states as those of `cuda_kernels`, so either backward fits either forward.
    """
    ops = torch.ops.rwkv
    return Kernels(
        lambda *tensors: ops.wkv7_cuda_chunk_forward(*tensors, slice_length, device, stream()),
        lambda *tensors: ops.wkv7_cuda_chunk_backward(*tensors, slice_length, device, stream()),
    )


def chunk_kernels_for(r: Tensor) -> Kernels:
    """The kernels by chunks for the GPU of `r`; they run on torch's current stream."""
    device = r.device.index
    return cuda_chunk_kernels(device, current_stream(device), slice_length(r.shape[0] * r.shape[2]))


class _WKV7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, r, w, k, v, a, b, state, initial, reset):
        y, last, saved = kernels.forward(r, w, k, v, a, b, state, initial, reset)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(r, w, k, v, a, b, initial, reset, saved)
        return y, last

    @staticmethod
    def backward(ctx, gy, glast):
        refuse_second_derivatives("wkv7")
        *inputs, initial, reset, saved = ctx.saved_tensors
        gy = torch.zeros_like(inputs[0]) if gy is None else gy.contiguous()
        glast = None if glast is None else glast.contiguous()
        *grads, gstate, ginitial = ctx.kernels.backward(*inputs, initial, reset, saved, gy, glast)
        wanted = ctx.needs_input_grad
        return None, *grads, gstate if wanted[7] else None, ginitial if wanted[8] else None, None


def run(
    kernels: Kernels,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv7` with these kernels; `initial=None` is the empty state."""
    r, k, v, a, b = (x.contiguous() for x in (r, k, v, a, b))
    state, reset, initial = prepared(state, reset, initial)
    return _WKV7.apply(kernels, r, w.float().contiguous(), k, v, a, b, state, initial, reset)


def wkv7(r: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv7` with the kernels for the device of `r`."""
    return run(kernels_for(r), r, *others)  # type: ignore[arg-type]


def wkv7_chunk(r: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv7` with the CUDA kernels by chunks."""
    return run(chunk_kernels_for(r), r, *others)  # type: ignore[arg-type]
