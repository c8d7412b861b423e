"""The WKV operator of RWKV-6 and, with a constant decay, of RWKV-5."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rwkv.wkv import dispatch, heads
from rwkv.wkv.heads import empty_state
from rwkv.wkv.wkv6 import native, reference

__all__ = ["empty_state", "wkv6"]


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
        impl: "cuda" or "cpu" (compiled), "reference" (a loop over time), or "auto": the first one
            available. "cuda-chunk": segments of the sequence in parallel, for few heads on GPUs;
            not chosen by "auto", as it has not been run on a GPU.

    Returns:
        y [B, T, H, N] in r's dtype, and the state [B, H, N, N] fp32 after the last token.
        Differentiable in all inputs; the gradient of `initial` is summed over the resets.

    Raises:
        ValueError: mismatched shapes, dtypes or devices, or an unknown impl.
        RuntimeError: the impl is unavailable; the message has the reason and a remedy.
    """
    by_token, by_head = tuple(r.shape), tuple(r.shape[2:])
    others = {"w": (w, by_head if w.dim() == 2 else by_token), "u": (u, by_head)}
    heads.check(r, {"k": k, "v": v}, others, state, reset, initial)
    implementations: dict[str, Callable[..., Any]]
    implementations = {
        "cuda": native.wkv6,
        "cpu": native.wkv6,
        "reference": reference.wkv6,
        "cuda-chunk": native.wkv6_chunk,  # after the reference, which is always available
    }
    run = dispatch.choose("wkv6", implementations, impl, r)
    return run(r, w, k, v, u, state, reset, state if initial is None else initial)
