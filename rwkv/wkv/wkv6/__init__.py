"""The WKV operator of RWKV-6 and, with a constant decay, of RWKV-5."""

import torch
from torch import Tensor

from rwkv.wkv import dispatch
from rwkv.wkv.wkv6 import native, reference
from rwkv.wkv.wkv6.reference import empty_state

__all__ = ["empty_state", "wkv6"]

MAX_HEAD_SIZE = 256  # WKV6_MAX_N in cuda/wkv6/wkv6_cpu.h


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The time mixing of RWKV-5 and RWKV-6, linear attention with a decay by channel (Peng et al.
    2024, arXiv:2404.05892, eq. 19), per head with state S [N (key), N (value)]:

        y_t = r_tᵀ (S_{t−1} + diag(u) k_t v_tᵀ)
        S_t = diag(e^{w_t}) S_{t−1} + k_t v_tᵀ

    Computed in fp32.

    Args:
        r, k, v: [B, T, H, N] fp32, bf16 or fp16; any B, T ≥ 1, H; N a multiple of 16.
        w: log-decay per step, ≤ 0, fp32: [B, T, H, N], or [H, N] for the same decay at every step.
        u: [H, N], the bonus of the current token.
        state: [B, H, N, N] fp32, before the first token. None: zeros.
        reset: [B, T] bool, True where a document starts: the state before that token is `initial`.
        initial: [B, H, N, N] fp32, the state at a document start; None: `state`. Pass it if `state`
            is carried over from earlier tokens.
        impl: "cpu" (compiled), "reference" (a loop over time), or "auto": the first one available.

    Returns:
        y [B, T, H, N] in r's dtype, and the state [B, H, N, N] fp32 after the last token.
        Differentiable in all inputs; the gradient of `initial` is summed over the resets.

    Raises:
        ValueError: mismatched shapes, dtypes or devices, or an unknown impl.
        RuntimeError: the impl is unavailable; the message has the reason and a remedy.
    """
    _check(r, w, k, v, u, state, reset, initial)
    implementations = {"cpu": native.wkv6_cpu, "reference": reference.wkv6}
    run = dispatch.choose("wkv6", implementations, impl, r)
    return run(r, w, k, v, u, state, reset, state if initial is None else initial)


def _check(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
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
    tensors = {"w": w, "k": k, "v": v, "u": u, "state": state, "reset": reset, "initial": initial}
    states, by_head = (batch, heads, size, size), (heads, size)
    shapes = {"u": by_head, "state": states, "initial": states, "reset": (batch, length)}
    shapes |= {"w": by_head} if w.dim() == 2 else {}
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
        if name in ("w", "u", "state", "initial") and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point; got {tensor.dtype}")
        if name in ("k", "v") and tensor.dtype != r.dtype:
            raise ValueError(f"{name} must have r's dtype {r.dtype}; got {tensor.dtype}")
