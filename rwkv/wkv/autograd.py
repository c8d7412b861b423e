"""What the autograd functions of the operators share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv.kernels.gpu import current_stream

HEAD_SIZE = 64  # up to this size the CUDA kernels of WKV6 and WKV7 compute in any dtype, above it in fp32 only


class Kernels(NamedTuple):
    """The two passes of WKV6 or WKV7; a state that is None is zeros.

    forward(*tensors, state, initial, reset) -> (y, state, saved states), and backward(*tensors,
    initial, reset, saved states, gy, gstate) -> gradients of the tensors, state and initial. The
    tensors are r, w, k, v, u, or r, w, k, v, a, b.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def in_fp32(kernels: Kernels) -> Kernels:
    """The kernels in fp32 for inputs of another dtype, to which y and the gradients are rounded."""

    def upcast(tensors):
        return (x if x is None or x.dtype == torch.bool else x.float() for x in tensors)

    def forward(r, *others):
        y, last, saved = kernels.forward(*upcast((r, *others)))
        return y.to(r.dtype), last, saved

    def backward(*given):
        *grads, gstate, ginitial = kernels.backward(*upcast(given))
        return *(g.to(x.dtype) for g, x in zip(grads, given, strict=False)), gstate, ginitial

    return Kernels(forward, backward)


def cpu_kernels(operator: str, r: Tensor) -> Kernels:
    """The CPU kernels of wkv6 or wkv7, for fp32 and bf16; fp16 is converted."""
    found = (getattr(torch.ops.rwkv, f"{operator}_cpu_{way}") for way in ("forward", "backward"))
    return in_fp32(Kernels(*found)) if r.dtype == torch.float16 else Kernels(*found)


def cuda_kernels(operator: str, r: Tensor, device: int, stream: Callable[[], int], *more: int) -> Kernels:
    """The CUDA kernels of wkv6 or wkv7 for inputs like `r`. `stream` returns the stream of each
    launch; `more` are further arguments of the operator.
    """
    forward, backward = (getattr(torch.ops.rwkv, f"{operator}_cuda_{way}") for way in ("forward", "backward"))
    kernels = Kernels(
        lambda *tensors: forward(*tensors, *more, device, stream()),
        lambda *tensors: backward(*tensors, *more, device, stream()),
    )
    return in_fp32(kernels) if r.dtype != torch.float32 and r.shape[-1] > HEAD_SIZE else kernels


def kernels_for(operator: str, r: Tensor, *more: int) -> Kernels:
    """The kernels of wkv6 or wkv7 for the device of `r`; on a GPU they run on torch's current
    stream, with `more` as in `cuda_kernels`.
    """
    if r.device.type == "cpu":
        return cpu_kernels(operator, r)
    return cuda_kernels(operator, r, r.device.index, current_stream(r.device.index), *more)


def prepared(
    state: Tensor | None, reset: Tensor | None, initial: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """state, reset and initial as the kernels need them: contiguous, states in fp32, and `initial`
    only with resets.
    """
    return (
        None if state is None else state.float().contiguous(),
        None if reset is None else reset.contiguous(),
        None if initial is None or reset is None else initial.float().contiguous(),
    )


def refuse_second_derivatives(operator: str) -> None:
    """Raise RuntimeError in a backward pass with create_graph. (once_differentiable would do the
    same, but is slower.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f'{operator}: the compiled kernels have no second derivatives (create_graph=True); use impl="reference"'
        )
