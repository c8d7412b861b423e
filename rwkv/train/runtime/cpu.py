"""Process settings for training on a CPU: denormals, malloc thresholds, and the default
precision.
"""

import ctypes
from pathlib import Path
from typing import Literal

import torch

from rwkv import compat

_BF16 = {"avx512_bf16", "amx_bf16"}  # CPU flags
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST_KEPT = 32 << 20  # bytes; the largest threshold that glibc accepts (HEAP_MAX_SIZE / 2)


def prepare() -> None:
    """Flush denormals to zero, warm up MKL, and keep freed memory in the process (with glibc only).
    Call once before training.
    """
    # softmax tails and Adam's moments become denormal, with which CPUs compute about ten times
    # slower
    torch.set_flush_denormal(True)
    compat.enable_mkl_avx2()
    # Every step frees and allocates the same tensors. By default glibc returns their memory to the
    # system in between; the page faults would take a third of the WKV operator's time
    # (docs/decisions/011-return-freed-memory.md).
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def precision() -> Literal["fp32", "bf16"]:
    """The default precision: bf16 on CPUs with instructions for it (AVX512-BF16, AMX), which takes
    about half the time of fp32; otherwise fp32. Not measured at run time, so that results are
    reproducible.
    """
    return "bf16" if _BF16 & _features() else "fp32"


def _features() -> set[str]:
    """CPU flags of the first processor from /proc/cpuinfo; empty if not available."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
