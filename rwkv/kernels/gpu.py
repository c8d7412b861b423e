"""The elementwise CUDA kernels, with the interface of the CPU's torch.ops.rwkv: launched on a stream, without synchronising.

Formulas: cuda/elementwise/fused.h; what is saved: rwkv/kernels/elementwise/native.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

OPERATIONS = ("norm_forward", "norm_backward", "mix_forward", "mix_backward", "gate_forward", "gate_backward", "relu2_forward",
              "relu2_backward", "dropout", "dropout_add", "loss")  # fmt: skip


class Unit:
    """The operations on fp32, bf16 and fp16 tensors of one GPU. `stream` returns the stream for each launch."""

    def __init__(self, device: int, stream: Callable[[], int]):
        for name in OPERATIONS:
            setattr(self, name, self._bound(getattr(torch.ops.rwkv, f"cuda_{name}"), device, stream))

    @staticmethod
    def _bound(operation: Callable[..., Any], device: int, stream: Callable[[], int]) -> Callable[..., Any]:
        return lambda *arguments: operation(*arguments, device, stream())


@functools.lru_cache
def unit(device: int) -> Unit:
    """For a GPU whose kernels are loaded (load.why_unavailable_on), on torch's current stream."""
    return Unit(device, lambda: torch.cuda.current_stream(device).cuda_stream)
