"""Load the compiled kernels once per process, or report why they are unavailable."""

import functools

import torch

from rwkv.commands import target
from rwkv.kernels import build

_loaded = False  # the host library
_devices: set[int] = set()  # GPUs whose kernels are loaded


def why_unavailable() -> str | None:
    """Load the host library once. Returns why it is unavailable, or None.

    A failure is cached until the next `make kernels`.
    """
    global _loaded
    if _loaded:  # called by every operator: a file check would take up to a tenth of its time
        return None
    reason = _why_unavailable(build.build_time_ns())
    _loaded = reason is None
    return reason


@functools.lru_cache(maxsize=1)
def _why_unavailable(stamp: int) -> str | None:
    if reason := build.why_unavailable():
        return reason
    try:
        torch.ops.load_library(str(build.library()))
    except OSError as error:
        return f"the library does not load ({error}); run: {target('kernels')}"
    return None


def why_unavailable_on(device: int) -> str | None:
    """Load the kernels of a GPU once. Returns why they are unavailable, or None.

    A failure is cached until the next `make kernels`.
    """
    if device in _devices:
        return None
    reason = _why_unavailable_on(device, build.build_time_ns())
    if reason is None:
        _devices.add(device)
    return reason


@functools.lru_cache(maxsize=64)
def _why_unavailable_on(device: int, stamp: int) -> str | None:
    if torch.version.hip:
        return "torch is a ROCm build, and the kernels are compiled for NVIDIA GPUs only"
    if reason := why_unavailable():
        return reason
    try:
        torch.ops.rwkv.cuda_load(device, str(build.device_code(torch.cuda.get_device_capability(device))))
    except (LookupError, RuntimeError) as error:
        return str(error)
    return None
