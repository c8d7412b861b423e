"""The CUDA kernels other than WKV, behind the interface of the CPU operators in torch.ops.rwkv.

Launches are asynchronous. Formulas: fused.h and time_mix.h in cuda/elementwise, and
cuda/optimizer/adamw.h, cuda/quant/quant.h.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

OPERATIONS = ("norm_forward", "norm_backward", "mix_forward", "mix_backward", "gate_forward", "gate_backward", "relu2_forward",
              "relu2_backward", "dropout", "dropout_add", "loss", "nf4_dense", "int8_dense", "adamw", "keys_forward",
              "keys_backward", "head_gate_forward", "head_gate_backward")  # fmt: skip


class CudaKernels:
    """The operations on one GPU, in fp32, bf16 and fp16. `stream` returns the stream to use."""

    def __init__(self, device: int, stream: Callable[[], int]):
        for name in OPERATIONS:
            setattr(self, name, self._bound(getattr(torch.ops.rwkv, f"cuda_{name}"), device, stream))

    @staticmethod
    def _bound(operation: Callable[..., Any], device: int, stream: Callable[[], int]) -> Callable[..., Any]:
        return lambda *arguments: operation(*arguments, device, stream())


@functools.lru_cache
def cuda_kernels(device: int) -> CudaKernels:
    """The operations of a GPU, whose kernels must be loaded, on torch's current stream."""
    return CudaKernels(device, lambda: torch.cuda.current_stream(device).cuda_stream)
