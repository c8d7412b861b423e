"""The CUDA kernels of RWKV-7's time-mix around WKV, for the tensors of time_mix.py."""

from typing import Any

from torch import Tensor

from rwkv.kernels.elementwise import by_head


def kernels(x: Any, v_first: Tensor | None, p: Any) -> Any:
    """The kernels for these Projections and Parameters; None if unavailable."""
    tensors = [t for t in (*x, v_first) if t is not None]
    return by_head.kernels(p.r_k.shape[-1], *tensors)


def _by_head(p: Any, *parameters: Tensor | None) -> list[Tensor]:
    return [t.detach().float().contiguous().view(p.r_k.shape) for t in parameters if t is not None]


def _keys_arguments(x: Any, v_first: Tensor | None, p: Any) -> tuple[list[Tensor], list[Tensor]]:
    later = x.mix is not None and v_first is not None and p.v0 is not None  # not in block 0
    inputs = [x.k, x.v, x.w, x.a, *((x.mix, v_first.contiguous()) if later and v_first is not None else ())]
    return inputs, _by_head(p, p.w0, p.a0, p.k_k, p.k_a, p.v0 if later else None)


def keys(run: Any, x: Any, v_first: Tensor | None, p: Any) -> tuple[Tensor, ...]:
    """w, k, v, a, b of WKV, [B, T, H, N]."""
    found = run.keys_forward(*_keys_arguments(x, v_first, p))
    return tuple(t.view(*t.shape[:2], *p.r_k.shape) for t in found)


def keys_gradient(
    run: Any, grads: list[Tensor], x: Any, v_first: Tensor | None, p: Any, affine: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of k, v, w, a, mix and v_first, and of w0, a0, v0, k_k, k_a (with `affine`).

    Args:
        grads: gradients of w, k, v, a, b, and further ones to add to those of k and v.
    """
    inputs, parameters = _keys_arguments(x, v_first, p)
    found: list[Any] = list(run.keys_backward(grads, inputs, parameters, affine))
    of_parameters = list(found.pop().unbind(0)) if affine else [None] * 5
    return [*found, *[None] * (6 - len(found))], of_parameters


def output(run: Any, y: Tensor, x: Any, k: Tensor, v: Tensor, p: Any, eps: float) -> Tensor:
    """(norm(y) + Σ(r · k · r_k) v) · g, [B, T, C]."""
    return run.head_gate_forward([y, x.g, x.r, k, v], _by_head(p, p.ln_weight, p.ln_bias, p.r_k), eps)


def output_gradient(
    run: Any, gout: Tensor, y: Tensor, x: Any, k: Tensor, v: Tensor, p: Any, eps: float, affine: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of y, g, r, k, v, and of ln_weight, ln_bias, r_k (with `affine`)."""
    parameters = _by_head(p, p.ln_weight, p.ln_bias, p.r_k)
    found = list(run.head_gate_backward(gout, [y, x.g, x.r, k, v], parameters, eps, affine))
    return found[:5], list(found[5].unbind(0)) if affine else [None] * 3
