"""The WKV operator of RWKV-4: one contract, several implementations, and a dispatch that explains what it refuses."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv.kernels import load
from rwkv.wkv import native, reference
from rwkv.wkv.reference import empty_state

__all__ = ["empty_state", "wkv4"]


def _cuda_refusal(k: Tensor) -> str | None:
    if k.device.type != "cuda":
        return f"k is on {k.device}, and this unit computes on NVIDIA GPUs; move the tensors to one"
    if k.dtype == torch.float64:
        return 'k is fp64 and this unit computes in fp32; use impl="reference"'
    return load.why_unavailable_on(k.device.index)


def _cpu_refusal(k: Tensor) -> str | None:
    if k.device.type != "cpu":
        return f"k is on {k.device}, and this unit computes on the CPU only; move the tensors there"
    if k.dtype == torch.float64:
        return 'k is fp64 and this unit computes in fp32; use impl="reference"'
    return load.why_unavailable()


# Fastest first; `auto` takes the first that does not refuse.
_IMPLEMENTATIONS: dict[str, tuple[Callable[[Tensor], str | None], Callable[..., tuple[Tensor, Tensor]]]] = {
    "cuda": (_cuda_refusal, native.wkv4_cuda),
    "cpu": (_cpu_refusal, native.wkv4_cpu),
    "reference": (lambda k: None, reference.wkv4),
}


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The RWKV-4 attention-free mixing over time (Peng et al. 2023, arXiv:2305.13048, eq. 14), in max-shifted fp32:

        y_t = (Σ_{i<t} e^{(t−1−i)w + k_i} v_i + e^{u+k_t} v_t) / (Σ_{i<t} e^{(t−1−i)w + k_i} + e^{u+k_t})

    Args:
        w: [C] fp32, −exp(time_decay): log-decay per step, ≤ 0.
        u: [C], time_first: the bonus of the current token.
        k, v: [B, T, C] fp32, bf16 or fp16; any B, T ≥ 1, C.
        state: [B, 3, C] fp32, numerator, denominator and running maximum before the first token; None: an empty state.
        reset: [B, T] bool, True where a new document starts: the state is cleared before that token.
        impl: "cuda" and "cpu" (compiled), "reference" (a loop over time), or "auto", the first usable one in this order.

    Returns:
        y [B, T, C] in k's dtype, and the state [B, 3, C] fp32 after the last token.
        Gradients flow to w, u, k, v and the state's numerator and denominator; the running maximum is a scale and has none.

    Raises:
        ValueError: shapes that do not fit, an unknown impl.
        RuntimeError: the impl asked for by name is not usable here; the message says why and what to do.
    """
    _check(w, u, k, v, state, reset)
    if impl == "auto":
        refusals: list[str] = []
        for name, (refusal, run) in _IMPLEMENTATIONS.items():
            reason = refusal(k)
            if reason is None:
                if name == "reference":
                    warnings.warn(_slow("\n".join(refusals)), stacklevel=2)
                return run(w, u, k, v, state, reset)
            refusals.append(f"  {name}: {reason}")
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not one of auto, {', '.join(_IMPLEMENTATIONS)}")
    refusal, run = _IMPLEMENTATIONS[impl]
    if reason := refusal(k):
        raise RuntimeError(f"wkv4: impl={impl!r} cannot be used: {reason}")
    return run(w, u, k, v, state, reset)


def _slow(refusals: str) -> str:
    return f"wkv4 runs as the reference loop, about a thousand times slower than a compiled unit, because each of those was refused:\n{refusals}"


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, reset: Tensor | None) -> None:
    if k.dim() != 3 or v.shape != k.shape or k.shape[1] < 1:
        raise ValueError(
            f"k and v must be [B, T, C] with T ≥ 1 and alike; they are {list(k.shape)} and {list(v.shape)}"
        )
    batch, length, channels = k.shape
    device, shapes = (
        k.device,
        {"v": k.shape, "w": (channels,), "u": (channels,), "state": (batch, 3, channels), "reset": (batch, length)},
    )
    for name, tensor in {"v": v, "w": w, "u": u, "state": state, "reset": reset}.items():
        if tensor is None:
            continue
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name} must be {list(shapes[name])} for k {list(k.shape)}; it is {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and k on {device}; put them on one device")
    floats = {"w": w, "u": u, "k": k, "v": v, "state": state}
    if wrong := [
        f"{name} is {tensor.dtype}"
        for name, tensor in floats.items()
        if tensor is not None and not tensor.is_floating_point()
    ]:
        raise ValueError(f"w, u, k, v and state must be floating-point; {', '.join(wrong)}")
    if v.dtype != k.dtype:
        raise ValueError(f"k and v must be of one dtype; they are {k.dtype} and {v.dtype}")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset must be bool; it is {reset.dtype}")
