"""How this process computes on a CPU: without denormals, keeping the memory that it frees, and in bf16 where the processor multiplies it."""

import ctypes
from pathlib import Path
from typing import Literal

import torch

from rwkv import compat

_BF16 = {"avx512_bf16", "amx_bf16"}  # CPU flags
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST_KEPT = 32 << 20  # bytes: the most that glibc accepts as a threshold (HEAP_MAX_SIZE / 2)


def prepare() -> None:
    """Call once, before training. What a C library other than glibc does with freed memory stays as it is."""
    # Softmax tails and Adam's fading moments fill up with denormals, which a CPU multiplies ten times more slowly.
    torch.set_flush_denormal(True)
    compat.wake_mkl()
    # Every step frees and allocates the same tensors. By default glibc returns their memory in
    # between, and each page then costs a fault: a third of the WKV operator's time
    # (docs/decisions/011-return-freed-memory.md).
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def precision() -> Literal["fp32", "bf16"]:
    """bf16 on a processor that has instructions to multiply it (AVX512-BF16, AMX), which takes about half of the time of fp32; without them it takes
    far longer. By these alone, not by a measurement: the same command makes the same numbers whatever else the machine does."""
    return "bf16" if _BF16 & _features() else "fp32"


def _features() -> set[str]:
    """Flags of the first processor, as the kernel names them; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
