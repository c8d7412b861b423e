"""How this process computes on a CPU: without denormals, keeping the memory that it frees, and in bf16 where that is faster."""

import ctypes
import functools
import os
import time
from typing import Literal

import torch

from rwkv import compat
from rwkv.memory import HEAP
from rwkv.model.linear import product
from rwkv.wkv import native

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)


def prepare() -> None:
    """Call once, before training. What a C library other than glibc does with freed memory stays as it is."""
    # Softmax tails and Adam's fading moments fill up with denormals, which a CPU multiplies ten times more slowly.
    torch.set_flush_denormal(True)
    compat.wake_mkl()
    # Every step frees and takes the same tensors again. glibc gives their memory back in between, and each page costs a fault: of the
    # WKV operator's time a third (LOG.md).
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_MMAP_THRESHOLD, HEAP)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    if native.refusal() is None:
        torch.ops.rwkv.cpu_memory()  # without it those blocks do not fit into the holes they left (cuda/cpu_memory.cpp)


def settle() -> None:
    """Call once, after the first step and when its gradients are gone: what glibc holds of freed memory goes back to the system. The optimizer's moments are made in
    the first step, in the holes that its other blocks left, which those fit into no more (LOG.md). A block that is taken again pays its page faults once."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def precision() -> Literal["fp32", "bf16"]:
    """bf16 if this CPU multiplies matrices of it at least 1.3 times as fast as of fp32 (with AVX512-BF16 or AMX twice as fast, without far slower), else
    fp32. Measured once; processes that this one starts take its answer, as those of one run must agree."""
    if "RWKV_CPU_PRECISION" not in os.environ:
        compat.wake_mkl()
        os.environ["RWKV_CPU_PRECISION"] = "bf16" if 1.3 * _seconds(torch.bfloat16) <= _seconds(torch.float32) else "fp32"
    return "bf16" if os.environ["RWKV_CPU_PRECISION"] == "bf16" else "fp32"


@functools.cache
def _seconds(dtype: torch.dtype) -> float:
    """The best of some products of the size that training has."""
    generator = torch.Generator()  # of its own: a run draws the same numbers with and without a measurement
    x, weight = (torch.randn(size, 512, generator=generator).to(dtype) for size in (256, 1024))
    times = []
    for _ in range(6):
        started = time.perf_counter()
        product(x, weight)
        times.append(time.perf_counter() - started)
    return min(times)
