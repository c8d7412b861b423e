"""The WKV operator of RWKV-7, and its time-mix (time_mix.py)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rwkv.wkv import dispatch, heads
from rwkv.wkv.heads import empty_state
from rwkv.wkv.wkv7 import native, reference

__all__ = ["empty_state", "wkv7"]


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
            available. "cuda-chunk": chunks of 16 tokens by matrix products, for heads of 64 on GPUs
            of compute capability 8.0; not yet verified on a GPU, and not selected by "auto". A w
            below −4 makes its chunk NaN there, and a NaN spreads over its chunk.

    Returns:
        y [B, T, H, N] in r's dtype, and the state [B, H, N, N] fp32 after the last token.
        Differentiable in all inputs; the gradient of `initial` is summed over the resets.

    Raises:
        ValueError: mismatched shapes, dtypes or devices, or an unknown impl.
        RuntimeError: the impl is unavailable; the message has the reason and a remedy.
    """
    heads.check(r, {"k": k, "v": v, "a": a, "b": b}, {"w": (w, tuple(r.shape))}, state, reset, initial)
    implementations: dict[str, Callable[..., Any]]
    implementations = {
        "cuda": native.wkv7,
        "cpu": native.wkv7,
        "reference": reference.wkv7,
        "cuda-chunk": native.wkv7_chunk,  # after the reference, which is always available
    }
    run = dispatch.choose("wkv7", implementations, impl, r)
    return run(r, w, k, v, a, b, state, reset, state if initial is None else initial)
