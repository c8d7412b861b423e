"""The CUDA kernels other than WKV, behind the interface of the CPU operators in torch.ops.rwkv.

Launches are asynchronous. Formulas: fused.h and time_mix.h in cuda/elementwise, and
cuda/optimizer/adamw.h, cuda/quant/quant.h.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

OPERATIONS = ("norm_forward", "norm_backward", "mix_forward", "mix_backward", "mix_dropout_forward", "gate_forward",
              "gate_backward", "relu2_forward", "relu2_backward", "dropout", "dropout_add", "loss", "nf4_dense", "int8_dense", "adamw")  # fmt: skip
TIME_MIX = (
    "keys_forward",
    "keys_backward",
    "head_gate_forward",
    "head_gate_backward",
    "shift_forward",
    "shift_backward",
)
"""Of RWKV-5 to 7; RWKV_FUSED=0 switches them off."""


def time_mix_enabled() -> bool:
    """Whether the kernels in TIME_MIX are used, where torch's operations can replace them."""
    return os.environ.get("RWKV_FUSED") != "0"


class CudaKernels:
    """The operations on one GPU, in fp32, bf16 and fp16. `stream` returns the stream to use."""

    def __init__(self, device: int, stream: Callable[[], int]):
        for name in (*OPERATIONS, *TIME_MIX):
            run = self._bound(getattr(torch.ops.rwkv, f"cuda_{name}"), device, stream)
            setattr(self, name, _with_advice(run) if name in TIME_MIX else run)

    @staticmethod
    def _bound(operation: Callable[..., Any], device: int, stream: Callable[[], int]) -> Callable[..., Any]:
        return lambda *arguments: operation(*arguments, device, stream())


def _with_advice(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation; if the driver refuses its kernel, the error says how to do without it."""

    def run(*arguments: Any) -> Any:
        try:
            return operation(*arguments)
        except RuntimeError as error:
            if not str(error).startswith(("cuLaunchKernel", "cuModuleGetFunction")):
                raise
            message = f"{error}. RWKV_FUSED=0 before the command replaces this kernel by operations of torch"
            raise RuntimeError(message) from error

    return run


def current_stream(device: int) -> Callable[[], int]:
    """Returns torch's current stream of a GPU, as a number, at each call.
    (`torch.cuda.current_stream` would make a Stream object first.)
    """
    return functools.partial(torch._C._cuda_getCurrentRawStream, device)


@functools.lru_cache
def cuda_kernels(device: int) -> CudaKernels:
    """The operations of a GPU, whose kernels must be loaded, on torch's current stream."""
    return CudaKernels(device, current_stream(device))
