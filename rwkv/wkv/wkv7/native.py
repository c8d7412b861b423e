"""Autograd for the compiled WKV7 kernels (torch.ops.rwkv.wkv7_*)."""

from typing import Any

import torch
from torch import Tensor


def forward(*tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """forward(r, w, k, v, a, b, state, initial, reset) -> (y, state, saved states); None for a
    state: zeros.
    """
    return torch.ops.rwkv.wkv7_cpu_forward(*tensors)


def backward(*tensors: Tensor | None) -> Any:
    """backward(r, w, k, v, a, b, initial, reset, saved states, gy, gstate) -> gradients of r, w, k,
    v, a, b, state and initial.
    """
    return torch.ops.rwkv.wkv7_cpu_backward(*tensors)


def refuse_second_derivatives() -> None:
    """Raise RuntimeError in a backward pass with create_graph. (once_differentiable would do the
    same, but is slower.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            'wkv7: the compiled kernels have no second derivatives (create_graph=True); use impl="reference"'
        )


class _WKV7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, w, k, v, a, b, state, initial, reset):
        y, last, saved = forward(r, w, k, v, a, b, state, initial, reset)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(r, w, k, v, a, b, initial, reset, saved)
        return y, last

    @staticmethod
    def backward(ctx, gy, glast):
        refuse_second_derivatives()
        *inputs, initial, reset, saved = ctx.saved_tensors
        gy = torch.zeros_like(inputs[0]) if gy is None else gy.contiguous()
        glast = None if glast is None else glast.contiguous()
        *grads, gstate, ginitial = backward(*inputs, initial, reset, saved, gy, glast)
        wanted = ctx.needs_input_grad
        return *grads, gstate if wanted[6] else None, ginitial if wanted[7] else None, None


def wkv7_cpu(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv7` for CPU tensors; fp16 is converted to fp32 and back. `initial=None` is the
    empty state.
    """
    dtype = r.dtype
    r, k, v, a, b = ((x.float() if dtype == torch.float16 else x).contiguous() for x in (r, k, v, a, b))
    state = None if state is None else state.float().contiguous()
    initial = None if initial is None or reset is None else initial.float().contiguous()
    reset = None if reset is None else reset.contiguous()
    y, last = _WKV7.apply(r, w.float().contiguous(), k, v, a, b, state, initial, reset)
    return y.to(dtype), last
