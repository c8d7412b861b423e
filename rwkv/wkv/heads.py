"""What operators with a matrix-valued state by head (WKV6, WKV7) share: argument checks, and the
empty state.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

MAX_SIZE = 256  # WKV6_MAX_N and WKV7_MAX_N in cuda/


def valid_size(size: int) -> bool:
    """Whether heads can have this size."""
    return size % 16 == 0 and 0 < size <= MAX_SIZE


def check(
    r: Tensor,
    like_r: Mapping[str, Tensor],
    others: Mapping[str, tuple[Tensor, tuple[int, ...]]],
    state: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
) -> None:
    """Check the arguments of an operator.

    Args:
        r: [B, T, H, N].
        like_r: tensors of r's shape and dtype, by name.
        others: tensors of any floating-point dtype with their shapes, by name.
        state, reset, initial: as in the operators.

    Raises:
        ValueError: mismatched shapes, dtypes or devices.
    """
    if r.dim() != 4 or r.shape[1] < 1:
        raise ValueError(f"r must be [B, T, H, N] with T ≥ 1; got {list(r.shape)}")
    batch, length, heads, size = r.shape
    if not valid_size(size):
        raise ValueError(f"the head size must be a multiple of 16, at most {MAX_SIZE}; got {size}")
    if not r.is_floating_point():
        raise ValueError(f"r must be floating-point; got {r.dtype}")
    states = (batch, heads, size, size)
    tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        **{name: (tensor, tuple(r.shape)) for name, tensor in like_r.items()},
        **others,
        "state": (state, states),
        "reset": (reset, (batch, length)),
        "initial": (initial, states),
    }
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for r {list(r.shape)}; got {list(tensor.shape)}")
        if tensor.device != r.device:
            raise ValueError(f"{name} is on {tensor.device} and r on {r.device}; move them to the same device")
        if name == "reset":
            if tensor.dtype != torch.bool:
                raise ValueError(f"reset must be bool; got {tensor.dtype}")
        elif name in like_r:
            if tensor.dtype != r.dtype:
                raise ValueError(f"{name} must have r's dtype {r.dtype}; got {tensor.dtype}")
        elif not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point; got {tensor.dtype}")


def empty_state(
    batch: int, heads: int, size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """The state before any token: zeros [B, H, N, N]."""
    return torch.zeros(batch, heads, size, size, device=device, dtype=dtype)
