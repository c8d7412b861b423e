"""The WKV operator of RWKV-4."""

import torch
from torch import Tensor

from rwkv.wkv import dispatch
from rwkv.wkv.wkv4 import native, reference
from rwkv.wkv.wkv4.reference import empty_state

__all__ = ["empty_state", "wkv4"]


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    initial: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The WKV operator of RWKV-4 (Peng et al. 2023, arXiv:2305.13048, eq. 14).

        y_t = (Σ_{i<t} e^{(t−1−i)w + k_i} v_i + e^{u+k_t} v_t)
            / (Σ_{i<t} e^{(t−1−i)w + k_i}     + e^{u+k_t}    )

    Computed in fp32, and in a stable form with a running maximum of the exponents.

    Args:
        w: [C] fp32, −exp(time_decay): log-decay per step, ≤ 0.
        u: [C], time_first: the bonus of the current token.
        k, v: [B, T, C] fp32, bf16 or fp16; any B, T ≥ 1, C.
        state: [B, 3, C] fp32, numerator, denominator and running maximum before the first token.
            None: the empty state.
        reset: [B, T] bool, True where a document starts: the state before that token is `initial`.
        initial: [B, 3, C] fp32, the state at a document start; None: `state`. Pass it if `state` is
            carried over from earlier tokens.
        impl: "cuda" or "cpu" (compiled), "reference" (a loop over time), or "auto": the first one
            available.

    Returns:
        y [B, T, C] in k's dtype, and the state [B, 3, C] fp32 after the last token.
        Differentiable in w, u, k, v and the numerator and denominator of `state` and `initial`. The
        running maximum is only a scale and has no gradient.

    Raises:
        ValueError: mismatched shapes, dtypes or devices, or an unknown impl.
        RuntimeError: the impl is unavailable; the message has the reason and a remedy.
    """
    _check(w, u, k, v, state, reset, initial)
    implementations = {"cuda": native.wkv4_cuda, "cpu": native.wkv4_cpu, "reference": reference.wkv4}
    run = dispatch.choose("wkv4", implementations, impl, k)
    return run(w, u, k, v, state, reset, state if initial is None else initial)


def _check(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, reset: Tensor | None, initial: Tensor | None
) -> None:
    if k.dim() != 3 or v.shape != k.shape or k.shape[1] < 1:
        raise ValueError(
            f"k and v must have the same shape [B, T, C] with T ≥ 1; got {list(k.shape)} and {list(v.shape)}"
        )
    batch, length, channels = k.shape
    shapes = {
        "v": k.shape,
        "w": (channels,),
        "u": (channels,),
        "state": (batch, 3, channels),
        "reset": (batch, length),
        "initial": (batch, 3, channels),
    }
    for name, tensor in {"v": v, "w": w, "u": u, "state": state, "reset": reset, "initial": initial}.items():
        if tensor is None:
            continue
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name} must be {list(shapes[name])} for k {list(k.shape)}; got {list(tensor.shape)}")
        if tensor.device != k.device:
            raise ValueError(f"{name} is on {tensor.device} and k on {k.device}; move them to the same device")
        if name != "reset" and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point; got {tensor.dtype}")
    if not k.is_floating_point():
        raise ValueError(f"k must be floating-point; got {k.dtype}")
    if v.dtype != k.dtype:
        raise ValueError(f"k and v must have the same dtype; got {k.dtype} and {v.dtype}")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset must be bool; got {reset.dtype}")
