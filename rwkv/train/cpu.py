"""How this process computes on a CPU: without denormals, and keeping the memory that it frees."""

import ctypes

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST = 32 << 20  # bytes: blocks above are mapped one by one in any case (glibc's HEAP_MAX_SIZE / 2)


def prepare() -> None:
    """Call once, before training. What a C library other than glibc does with freed memory stays as it is."""
    # Softmax tails and Adam's fading moments fill up with denormals, which a CPU multiplies ten times more slowly.
    torch.set_flush_denormal(True)
    # Every step frees and takes the same tensors again. glibc gives their memory back in between, and each page costs a fault: of the
    # WKV operator's time a third (LOG.md).
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
