"""Autograd for the compiled WKV4 kernels (torch.ops.rwkv.wkv4_*)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv.kernels.gpu import current_stream
from rwkv.wkv.autograd import prepared, refuse_second_derivatives

SAVE_INTERVAL = 16  # tokens per saved state: WKV4_SAVE_INTERVAL in cuda/wkv4/wkv4_args.h
THREADS = 1 << 17  # enough to fill a GPU (measured on an H100: docs/results.md)


def segment_length(batch: int, length: int, channels: int) -> int:
    """Tokens per GPU thread.

    The sequence is split into about THREADS threads, each with at least two saved states, but only
    if that gives at least four times as many threads (splitting reads k and v twice).
    """
    segments = THREADS // max(1, batch * channels)
    tokens = length if segments < 4 else max(2 * SAVE_INTERVAL, -(-length // segments))
    return -(-tokens // SAVE_INTERVAL) * SAVE_INTERVAL


class Kernels(NamedTuple):
    """forward(w, u, k, v, state, initial, reset) -> (y, state, saved states), and
    backward(w, u, k, v, initial, reset, saved states, gy, gstate) -> gradients."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def cpu_kernels() -> Kernels:
    """The CPU kernels, for fp32 and bf16."""
    return Kernels(torch.ops.rwkv.wkv4_cpu_forward, torch.ops.rwkv.wkv4_cpu_backward)


def cuda_kernels(device: int, stream: Callable[[], int], segment: int) -> Kernels:
    """The CUDA kernels, for fp32, bf16 and fp16. `stream` returns the stream of each launch."""
    ops = torch.ops.rwkv
    return Kernels(
        lambda *tensors: ops.wkv4_cuda_forward(*tensors, segment, device, stream()),
        lambda *tensors: ops.wkv4_cuda_backward(*tensors, segment, device, stream()),
    )


class _WKV4(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, w, u, k, v, state, initial, reset):
        y, last, saved = kernels.forward(w, u, k, v, state, initial, reset)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w, u, k, v, initial, reset, saved)
        return y, last

    @staticmethod
    def backward(ctx, gy, glast):
        refuse_second_derivatives("wkv4")
        w, u, k, v, initial, reset, saved = ctx.saved_tensors
        gy = torch.zeros_like(k) if gy is None else gy.contiguous()
        glast = None if glast is None else glast.contiguous()
        *grads, gstate, ginitial = ctx.kernels.backward(w, u, k, v, initial, reset, saved, gy, glast)
        wanted = ctx.needs_input_grad
        return None, *grads, gstate if wanted[5] else None, ginitial if wanted[6] else None, None


def run(
    kernels: Kernels,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv4` with these kernels; `initial=None` is the empty state."""
    state, reset, initial = prepared(state, reset, initial)
    w, u = w.float().contiguous(), u.float().contiguous()
    return _WKV4.apply(kernels, w, u, k.contiguous(), v.contiguous(), state, initial, reset)


def wkv4_cpu(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, reset: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv4` for CPU tensors; fp16 is converted to fp32 and back."""
    if k.dtype != torch.float16:
        return run(cpu_kernels(), w, u, k, v, state, reset, initial)
    y, last = run(cpu_kernels(), w, u, k.float(), v.float(), state, reset, initial)
    return y.half(), last


def wkv4_cuda(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, reset: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv4` for tensors on one GPU, on its current stream."""
    device = k.device.index
    kernels = cuda_kernels(device, current_stream(device), segment_length(*k.shape))
    return run(kernels, w, u, k, v, state, reset, initial)
