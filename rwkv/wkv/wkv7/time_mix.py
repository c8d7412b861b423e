"""RWKV-7's time-mix between its linear layers: keys, decays, WKV, normalisation by head, and gate.

It saves the outputs of the linear layers, y, and every 16th state of WKV; the backward pass
recomputes everything in between. All is computed in fp32 (fp64 for fp64 inputs); the inputs of WKV
are rounded to the dtype of the linear layers. On a GPU, keys and output are one kernel each
(fused.py), elsewhere operations of torch.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv.kernels.elementwise.reference import upcast
from rwkv.wkv import dispatch
from rwkv.wkv.autograd import refuse_second_derivatives
from rwkv.wkv.wkv7 import fused, native, reference

STRONGEST = -math.exp(-0.5)  # log-decay per token


class Projections(NamedTuple):
    """Outputs of linear layers, [B, T, C]."""

    r: Tensor
    g: Tensor
    """The gate."""
    k: Tensor
    v: Tensor
    w: Tensor
    """Low-rank part of the decay, before the sigmoid."""
    a: Tensor
    """Low-rank part of the in-context learning rate, before the sigmoid."""
    mix: Tensor | None
    """Low-rank part of the share of v_first, before the sigmoid; None in block 0."""


class Parameters(NamedTuple):
    """Vectors, [1, 1, C] or [C], and r_k [H, N]."""

    ln_weight: Tensor
    ln_bias: Tensor
    r_k: Tensor
    w0: Tensor
    a0: Tensor
    v0: Tensor | None
    """None in block 0."""
    k_k: Tensor
    k_a: Tensor


def time_mix(
    x: Projections,
    v_first: Tensor | None,
    p: Parameters,
    state: Tensor,
    reset: Tensor | None = None,
    initial: Tensor | None = None,
    *,
    eps: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The input of the output layer [B, T, C], and the state after the last token.

    Args:
        v_first: the value of block 0 [B, T, C]; None in block 0.
        state: [B, H, N, N] fp32.
        reset: [B, T] bool, True where a document starts: the state before that token is `initial`.
        initial: [B, H, N, N] fp32, the state at a document start; None: zeros.
        eps: of the normalisation by head.
        impl: as for rwkv.wkv.wkv7.
    """
    implementations: dict[str, Callable[..., Any]]
    implementations = {
        "cuda": _compiled,
        "cpu": _compiled,
        "reference": _by_autograd,
        "cuda-chunk": functools.partial(_compiled, kernels_for=native.chunk_kernels_for),
    }
    run = dispatch.choose("wkv7", implementations, impl, _heads(x.r, p))
    return run(x, v_first, p, state, reset, initial, eps)


def _by_autograd(
    x: Projections,
    v_first: Tensor | None,
    p: Parameters,
    state: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    w, k, v, a, b = _keys(x, v_first, p)
    initial = torch.zeros_like(state) if initial is None else initial
    y, state = reference.wkv7(_heads(x.r, p), w, k, v, a, b, state, reset, initial)
    return _output(y, x, k, v, p, eps), state


def _compiled(
    x: Projections,
    v_first: Tensor | None,
    p: Parameters,
    state: Tensor,
    reset: Tensor | None,
    initial: Tensor | None,
    eps: float,
    kernels_for: Callable[[Tensor], native.Kernels] = native.kernels_for,
) -> tuple[Tensor, Tensor]:
    x = Projections(*(None if t is None else t.contiguous() for t in x))  # type: ignore[arg-type]
    initial = None if initial is None or reset is None else initial.float().contiguous()
    reset = None if reset is None else reset.contiguous()
    return _TimeMix.apply(kernels_for, eps, reset, state.float().contiguous(), initial, v_first, *x, *p)


class _TimeMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels_for, eps, reset, state, initial, v_first, *tensors):
        x, p = _split(tensors)
        run = fused.kernels(x, v_first, p)
        inputs = fused.keys(run, x, v_first, p) if run else _keys(x, v_first, p)
        r = _heads(x.r, p)
        y, last, saved = kernels_for(r).forward(r, *inputs, state, initial, reset)
        ctx.kernels_for, ctx.eps = kernels_for, eps
        ctx.set_materialize_grads(False)
        # copy the parameters: ZeRO-3 may have released them by the backward pass, and a view would
        # keep the buffer that they were gathered into
        copies = (None if t is None else t.detach().clone() for t in p)
        ctx.save_for_backward(reset, initial, y, saved, v_first, *x, *copies)
        k, v = inputs[1:3]
        return fused.output(run, y, x, k, v, p, eps) if run else _output(y, x, k, v, p, eps), last

    @staticmethod
    def backward(ctx, gout, glast):
        refuse_second_derivatives("wkv7")
        reset, initial, y, saved, *tensors = ctx.saved_tensors
        v_first, *tensors = tensors
        x, p = _split(tensors)
        glast = None if glast is None else glast.contiguous()
        gout = torch.zeros_like(x.g) if gout is None else gout.contiguous()

        def of_wkv(inputs, gy):
            r = _heads(x.r, p)
            return ctx.kernels_for(r).backward(r, *inputs, initial, reset, saved, gy, glast)

        forward = _Forward(x, v_first, p, y, ctx.eps)
        run = fused.kernels(x, v_first, p)
        gradients = functools.partial(_fused_gradients, run) if run else _gradients_by_autograd
        gstate, ginitial, grads = gradients(forward, gout, ctx.needs_input_grad[5:], of_wkv)
        gstate = gstate if ctx.needs_input_grad[3] else None
        ginitial = ginitial if ctx.needs_input_grad[4] else None
        return None, None, None, gstate, ginitial, *grads


class _Forward(NamedTuple):
    """What the backward pass needs of the forward pass; y is WKV's output."""

    x: Projections
    v_first: Tensor | None
    p: Parameters
    y: Tensor
    eps: float


# of state, of initial, and of v_first, Projections and Parameters
_Gradients = tuple[Tensor | None, Tensor | None, list[Tensor | None]]


def _fused_gradients(
    run: Any, forward: _Forward, gout: Tensor, wanted: tuple[bool, ...], of_wkv: Callable[..., Any]
) -> _Gradients:
    """The gradients by CUDA kernels. of_wkv(inputs, gy) is WKV's backward pass."""
    x, v_first, p, y, eps = forward
    inputs = fused.keys(run, x, v_first, p)
    k, v = inputs[1:3]
    (gy, gg, gr, *of_kv), of_norm = fused.output_gradient(run, gout, y, x, k, v, p, eps, any(wanted[8:11]))
    gr2, *of_inputs, gstate, ginitial = of_wkv(inputs, gy)
    gr = gr.add_(gr2.view(gr.shape))
    (*of_x, gfirst), of_keys = fused.keys_gradient(run, [*of_inputs, *of_kv], x, v_first, p, any(wanted[11:]))
    parameters = [
        None if g is None or t is None else g.view(t.shape).to(t.dtype)
        for g, t in zip([*of_norm, *of_keys], p, strict=True)
    ]
    return gstate, ginitial, [gfirst, gr, gg, *of_x, *parameters]


def _gradients_by_autograd(
    forward: _Forward, gout: Tensor, wanted: tuple[bool, ...], of_wkv: Callable[..., Any]
) -> _Gradients:
    """As _fused_gradients, but only the gradients in `wanted`."""
    x, v_first, p, y, eps = forward
    with torch.enable_grad():
        v_first, *tensors = (
            None if t is None else t.detach().requires_grad_(want)
            for t, want in zip((v_first, *x, *p), wanted, strict=True)
        )
        x, p = _split(tensors)
        outputs = _keys(x, v_first, p)
        inputs = [t.detach().requires_grad_() for t in outputs]
        y = y.detach().requires_grad_()
        out = _output(y, x, inputs[1], inputs[2], p, eps)
    gy, gk, gv, gr, gg, *of_norm = _gradients([out], [y, *inputs[1:3], *x[:2], *p[:3]], [gout])
    assert gy is not None
    with torch.no_grad():
        gr2, *of_inputs, gstate, ginitial = of_wkv([t.detach() for t in inputs], gy.contiguous())
        of_inputs[1] += gk
        of_inputs[2] += gv
        gr = None if gr is None else gr.add_(gr2.flatten(2))
    gfirst, *of_keys = _gradients(outputs, [v_first, *x[2:], *p[3:]], of_inputs)
    return gstate, ginitial, [gfirst, gr, gg, *of_keys[:5], *of_norm, *of_keys[5:]]


def _split(tensors) -> tuple[Projections, Parameters]:
    return Projections(*tensors[:7]), Parameters(*tensors[7:])


def _gradients(
    outputs: list[Tensor] | tuple[Tensor, ...], inputs: list[Tensor | None], grads: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of the inputs that require one; None for the others."""
    ends = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    chosen = [x for x in inputs if x is not None and x.requires_grad]
    if not ends or not chosen:
        return [None] * len(inputs)
    found = iter(torch.autograd.grad([out for out, _ in ends], chosen, [grad for _, grad in ends], allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def _heads(x: Tensor, p: Parameters) -> Tensor:
    """[B, T, C] → [B, T, H, N]."""
    return x.view(*x.shape[:2], *p.r_k.shape)


def _keys(x: Projections, v_first: Tensor | None, p: Parameters) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """w, k, v, a, b of WKV, [B, T, H, N]."""
    dtype, k, v = x.k.dtype, upcast(x.k), upcast(x.v)
    # fp32 log-decay: bf16 would round a decay close to 1 to 1
    w = STRONGEST * torch.sigmoid(upcast(p.w0) + upcast(x.w))
    rate = torch.sigmoid(upcast(p.a0) + upcast(x.a))
    if x.mix is not None and v_first is not None and p.v0 is not None:  # not in block 0
        v = torch.lerp(v, upcast(v_first), torch.sigmoid(upcast(p.v0) + upcast(x.mix)))
    removal = F.normalize(_heads(k * upcast(p.k_k), p), dim=-1, eps=1e-12)
    k = k * (1 + (rate - 1) * upcast(p.k_a))
    k, v, w, rate = (_heads(t, p) for t in (k, v, w, rate))
    return w, k.to(dtype), v.to(dtype), (-removal).to(dtype), (removal * rate).to(dtype)


def _output(y: Tensor, x: Projections, k: Tensor, v: Tensor, p: Parameters, eps: float) -> Tensor:
    """(norm(y) + Σ(r · k · r_k) v) · g, [B, T, C]; sum and norm are by head."""
    normed = F.layer_norm(upcast(y), y.shape[-1:], eps=eps).flatten(2) * upcast(p.ln_weight) + upcast(p.ln_bias)
    bonus = (upcast(_heads(x.r, p)) * upcast(k) * upcast(p.r_k)).sum(-1, keepdim=True) * upcast(v)
    return ((normed + bonus.flatten(2)) * upcast(x.g)).to(x.g.dtype)
