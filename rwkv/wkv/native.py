"""Autograd over the compiled units (torch.ops.rwkv.*)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEEP = 16  # tokens per kept state (cuda/wkv4_args.h)
THREADS = 1 << 17  # that a GPU is given, if the sequence is long enough (measured on an H100: docs/results.md)


def segment_length(batch: int, length: int, channels: int) -> int:
    """Tokens that one GPU thread runs through: the sequence is split until about THREADS threads have work, but no finer than two
    kept states, and not at all where a split would not at least quadruple the threads (it reads k and v a second time)."""
    segments = THREADS // max(1, batch * channels)
    tokens = length if segments < 4 else max(2 * KEEP, -(-length // segments))
    return -(-tokens // KEEP) * KEEP


class Unit(NamedTuple):
    """A compiled unit: (w, u, k, v, state, reset) -> (y, state, kept), and (w, u, k, v, reset, kept, gy, gstate) -> gradients."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def cpu_unit() -> Unit:
    """Takes fp32 and bf16 on a CPU."""
    return Unit(torch.ops.rwkv.wkv4_cpu_forward, torch.ops.rwkv.wkv4_cpu_backward)


def cuda_unit(device: int, stream: Callable[[], int], segment: int) -> Unit:
    """Takes fp32, bf16 and fp16 on a GPU. stream: the one to launch on, asked for at every launch."""
    ops = torch.ops.rwkv
    return Unit(
        lambda *tensors: ops.wkv4_cuda_forward(*tensors, segment, device, stream()),
        lambda *tensors: ops.wkv4_cuda_backward(*tensors, segment, device, stream()),
    )


class _WKV4(torch.autograd.Function):
    @staticmethod
    def forward(ctx, unit, w, u, k, v, state, reset):
        y, last, kept = unit.forward(w, u, k, v, state, reset)
        ctx.unit = unit
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w, u, k, v, reset, kept)
        return y, last

    @staticmethod
    def backward(ctx, gy, glast):
        if torch.is_grad_enabled():  # once_differentiable would say so too, and takes longer
            raise RuntimeError(
                'wkv4: a compiled unit has no gradients of gradients (create_graph=True); impl="reference" has them'
            )
        w, u, k, v, reset, kept = ctx.saved_tensors
        gy = torch.zeros_like(k) if gy is None else gy.contiguous()
        glast = None if glast is None else glast.contiguous()
        gw, gu, gk, gv, gstate = ctx.unit.backward(w, u, k, v, reset, kept, gy, glast)
        return None, gw, gu, gk, gv, gstate if ctx.needs_input_grad[5] else None, None


def run(
    unit: Unit, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `rwkv.wkv.wkv4`, by a unit; k's dtype is one that the unit takes."""
    state = None if state is None else state.float().contiguous()
    reset = None if reset is None else reset.contiguous()
    return _WKV4.apply(
        unit, w.float().contiguous(), u.float().contiguous(), k.contiguous(), v.contiguous(), state, reset
    )


def wkv4_cpu(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `rwkv.wkv.wkv4`, on CPU tensors; fp16 is converted to fp32 and back."""
    if k.dtype != torch.float16:
        return run(cpu_unit(), w, u, k, v, state, reset)
    y, last = run(cpu_unit(), w, u, k.float(), v.float(), state, reset)
    return y.half(), last


def wkv4_cuda(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `rwkv.wkv.wkv4`, on tensors of one GPU, on its current stream."""
    device = k.device.index
    unit = cuda_unit(device, lambda: torch.cuda.current_stream(device).cuda_stream, segment_length(*k.shape))
    return run(unit, w, u, k, v, state, reset)
