"""The token shift of RWKV-6, whose weights depend on the data, by CUDA kernels: mixtures of a token
and its predecessor (cuda/elementwise/shift.cu).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv.kernels.elementwise import native
from rwkv.kernels.elementwise.recompute import recompute_of, recomputed


def kernels(*tensors: Tensor) -> Any:
    """As native.time_mix_kernels."""
    return native.time_mix_kernels(*tensors)


def _parts(low: Tensor, up: Tensor) -> Tensor:
    """low · up of each mixture: [B, T, n R], [n, R, D] → [n, B, T, D], in one batched matmul."""
    return torch.bmm(_by_mixture(low, len(up)), up).view(len(up), *low.shape[:2], up.shape[-1])


def _by_mixture(low: Tensor, n: int) -> Tensor:
    """[B, T, n R] → [n, B T, R], a view."""
    return low.view(-1, n, low.shape[-1] // n).transpose(0, 1)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, last, reset, mix, low, up, computed, recompute, drops):
        ctx.run, ctx.recompute, ctx.dtype = run, recompute.function, up.dtype
        ctx.save_for_backward(last, reset, mix, low, computed, *recompute.inputs)
        found = run.shift_forward(x, last, reset, mix, _parts(low, computed), drops.seeds, drops.p, True)
        drops.values = found[len(mix) :]
        return tuple(found[: len(mix)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gy):
        last, reset, mix, low, up, *inputs = ctx.saved_tensors
        x, wanted, n = ctx.recompute(*inputs), ctx.needs_input_grad, len(up)
        grads = [g.contiguous() for g in gy]
        gx, glast, gparts, gmix = ctx.run.shift_backward(grads, x, last, reset, mix, _parts(low, up), wanted[4])
        gparts, glow, gup = gparts.flatten(1, 2), None, None
        if wanted[5]:
            glow = torch.bmm(gparts, up.transpose(1, 2)).transpose(0, 1).reshape(low.shape)
        if wanted[6]:
            gup = torch.bmm(_by_mixture(low, n).transpose(1, 2), gparts).to(ctx.dtype)
        return None, gx, glast if wanted[2] else None, None, gmix, glow, gup, None, None, None


def _mixture(
    run: Any,
    recompute: Callable[..., Tensor],
    i: int,
    p: float,
    seed: Tensor | None,
    last: Tensor,
    reset: Tensor | None,
    mix: Tensor,
    low: Tensor,
    up: Tensor,
    *inputs: Tensor | None,
) -> Tensor:
    """Mixture i alone; with a seed, its dropout."""
    rank = up.shape[1]
    parts = _parts(low[..., i * rank : (i + 1) * rank].contiguous(), up[i : i + 1])
    seeds, drops = ([], []) if seed is None else ([seed], [p])
    return run.shift_forward(recompute(*inputs), last, reset, mix[i : i + 1], parts, seeds, drops, seed is None)[0]


def shift(
    run: Any,
    x: Tensor,
    last: Tensor,
    reset: Tensor | None,
    weights: Sequence[Tensor],
    low: Tensor,
    up: Tensor,
    drops: Sequence[float] = (),
) -> list[Tensor]:
    """x + (before − x) (weight + low · up), for each of n mixtures.

    Args:
        run: the kernels, from `kernels(x, low)`.
        x: [B, T, D].
        last: [B, D], the token before the first.
        reset: [B, T] bool, True where a document starts: the token before is 0; None: nowhere.
        weights: of each mixture, D elements.
        low: [B, T, n R], the outputs of a low-rank layer, R for each mixture.
        up: [n, R, D], its second matrices.
        drops: as in native.mix.

    Saves low and the tensors that x is recomputed from.
    """
    mix = torch.cat([weight.reshape(1, -1) for weight in weights]).float()
    x, low, last, recompute = x.contiguous(), low.contiguous(), last.to(x.dtype).contiguous(), recompute_of(x)
    # a copy: under ZeRO-3 the parameter may not be gathered in the backward pass
    computed = up.detach().to(low.dtype, copy=True)
    dropping = native.Drops.draw(drops, x.device)
    mixed = _Shift.apply(run, x, last, reset, mix, low, up, computed, recompute, dropping)
    function = functools.partial(_mixture, run, recompute.function)
    dropping.attach(mixed, lambda i, p: functools.partial(function, i, p))
    saved = last, reset, mix, low, computed, *recompute.inputs
    return [recomputed(y, functools.partial(function, i, 0.0, None), *saved) for i, y in enumerate(mixed)]
