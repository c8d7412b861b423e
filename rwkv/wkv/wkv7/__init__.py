"""The WKV operator of RWKV-7, and its time-mix (time_mix.py)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv.wkv import dispatch
from rwkv.wkv.wkv7 import native, reference
from rwkv.wkv.wkv7.reference import empty_state

__all__ = ["empty_state", "wkv7"]

MAX_HEAD_SIZE = 256  # WKV7_MAX_N in cuda/wkv7/wkv7_cpu.h


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The time mixing of RWKV-7, a generalised delta rule (Peng et al. 2025, arXiv:2503.14456, eq.
    17), per head with state S [N (value), N (key)]:

        S_t = S_{t−1} (diag(e^{w_t}) + a_t b_tᵀ) + v_t k_tᵀ
        y_t = S_t r_t

    Computed in fp32.

    Args:
        r, k, v, a, b: [B, T, H, N] fp32, bf16 or fp16; any B, T ≥ 1, H; N a multiple of 16. In the
            model, a is minus the normalised removal key, and b is that key times the in-context
            learning rate.
        w: [B, T, H, N] fp32, log-decay per step, ≤ 0.
        state: [B, H, N, N] fp32, before the first token. None: zeros.
        reset: [B, T] bool, True where a document starts: the state before that token is `initial`.
        initial: [B, H, N, N] fp32, the state at a document start; None: `state`. Pass it if `state`
            is carried over from earlier tokens.
        impl: "cuda" or "cpu" (compiled), "reference" (a loop over time), or "auto": the first one
            available.

    Returns:
        y [B, T, H, N] in r's dtype, and the state [B, H, N, N] fp32 after the last token.
        Differentiable in all inputs; the gradient of `initial` is summed over the resets.

    Raises:
        ValueError: mismatched shapes, dtypes or devices, or an unknown impl.
        RuntimeError: the impl is unavailable; the message has the reason and a remedy.
    """
    _check(r, w, k, v, a, b, state, reset, initial)
    implementations: dict[str, Callable[..., Any]]
    implementations = {"cuda": native.wkv7, "cpu": native.wkv7, "reference": reference.wkv7}
    run = dispatch.choose("wkv7", implementations, impl, r)
    return run(r, w, k, v, a, b, state, reset, state if initial is None else initial)


def _check(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
) -> None:
    if r.dim() != 4 or r.shape[1] < 1:
        raise ValueError(f"r must be [B, T, H, N] with T ≥ 1; got {list(r.shape)}")
    batch, length, heads, size = r.shape
    if size % 16 or not 0 < size <= MAX_HEAD_SIZE:
        raise ValueError(f"the head size must be a multiple of 16, at most {MAX_HEAD_SIZE}; got {size}")
    if not r.is_floating_point():
        raise ValueError(f"r must be floating-point; got {r.dtype}")
    tensors = {"w": w, "k": k, "v": v, "a": a, "b": b, "state": state, "reset": reset, "initial": initial}
    shapes = {"state": (batch, heads, size, size), "initial": (batch, heads, size, size), "reset": (batch, length)}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shapes.get(name, r.shape):
            expected = list(shapes.get(name, r.shape))
            raise ValueError(f"{name} must be {expected} for r {list(r.shape)}; got {list(tensor.shape)}")
        if tensor.device != r.device:
            raise ValueError(f"{name} is on {tensor.device} and r on {r.device}; move them to the same device")
        if name == "reset" and tensor.dtype != torch.bool:
            raise ValueError(f"reset must be bool; got {tensor.dtype}")
        if name in ("w", "state", "initial") and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point; got {tensor.dtype}")
        if name in ("k", "v", "a", "b") and tensor.dtype != r.dtype:
            raise ValueError(f"{name} must have r's dtype {r.dtype}; got {tensor.dtype}")
