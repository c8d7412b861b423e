"""Choose the implementation of an operator, and explain why others are unavailable."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv.kernels import load


def _why_not_cuda(x: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"the inputs are on {x.device}; this implementation needs them on an NVIDIA GPU"
    if x.dtype == torch.float64:
        return 'the inputs are fp64, but the kernels compute in fp32; use impl="reference"'
    return load.why_unavailable_on(x.device.index)


def _why_not_wkv7_chunk(r: Tensor) -> str | None:
    if reason := _why_not_cuda(r):
        return reason
    if r.shape[-1] != 64:
        return f'the heads have {r.shape[-1]} elements; it takes heads of 64; use impl="cuda"'
    major, minor = torch.cuda.get_device_capability(r.device.index)
    if major < 8:
        return f'the GPU has compute capability {major}.{minor}; it needs 8.0 or higher; use impl="cuda"'
    return None


def _why_not_cpu(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"the inputs are on {x.device}; this implementation needs them on the CPU"
    if x.dtype == torch.float64:
        return 'the inputs are fp64, but the kernels compute in fp32; use impl="reference"'
    return load.why_unavailable()


_WHY_UNAVAILABLE: dict[str, Callable[[Tensor], str | None]] = {
    "cuda": _why_not_cuda,
    "cpu": _why_not_cpu,
    "reference": lambda x: None,
    "cuda-chunk": _why_not_cuda,
}
_OF_OPERATOR = {("wkv7", "cuda-chunk"): _why_not_wkv7_chunk}


def _why_unavailable(operator: str, impl: str, x: Tensor) -> str | None:
    return _OF_OPERATOR.get((operator, impl), _WHY_UNAVAILABLE[impl])(x)


def choose(
    operator: str, implementations: Mapping[str, Callable[..., Any]], impl: str, x: Tensor
) -> Callable[..., Any]:
    """The implementation `impl` of an operator for inputs like `x`; "auto": the first available.

    Raises:
        ValueError: `impl` is unknown.
        RuntimeError: `impl` is unavailable; the message has the reason and a remedy.
    """
    if impl == "auto":
        reasons: list[str] = []
        for name, run in implementations.items():
            reason = _why_unavailable(operator, name, x)
            if reason is None:
                if name == "reference":
                    warnings.warn(
                        f"{operator} falls back to the reference loop, about a thousand times slower than the"
                        " compiled kernels, which are unavailable:\n" + "\n".join(reasons),
                        stacklevel=3,
                    )
                return run
            reasons.append(f"  {name}: {reason}")
    if impl not in implementations:
        raise ValueError(f"impl={impl!r} is not one of auto, {', '.join(implementations)}")
    if reason := _why_unavailable(operator, impl, x):
        raise RuntimeError(f"{operator}: impl={impl!r} is unavailable: {reason}")
    return implementations[impl]
