"""The elementwise operations of a block in plain torch: reference and fallback for the kernels.

All compute in fp32 (fp64 for fp64 inputs) and round once, to the dtype of their input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in fp32; fp64 is unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dimension of x [..., D], returned in `dtype`."""
    x = upcast(x)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps).to(dtype)


def mix(x: Tensor, last: Tensor, initial: Tensor, reset: Tensor | None, weights: Tensor) -> list[Tensor]:
    """m·x + (1 − m)·previous for each m of weights [n, D].

    `previous` is the token before: `last` [B, D] for the first one, `initial` [B, D] where `reset`
    [B, T] is True.
    """
    now = upcast(x)  # once, so that gradients are also summed in fp32
    before = torch.cat([upcast(last)[:, None], now[:, :-1]], 1)
    if reset is not None:
        before = torch.where(reset[..., None], upcast(initial)[:, None], before)
    return [torch.lerp(before, now, m.to(now.dtype)).to(x.dtype) for m in weights]


def gate(r: Tensor, v: Tensor) -> Tensor:
    """σ(r)·v."""
    return (torch.sigmoid(upcast(r)) * upcast(v)).to(r.dtype)


def relu2(k: Tensor) -> Tensor:
    """max(k, 0)²."""
    return torch.relu(upcast(k)).square().to(k.dtype)


def gated_norm(eps: float, y: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """norm(y) · silu(g), normalised by head: y [B, T, H, N], g [B, T, A], weight and bias [A]."""
    normed = F.layer_norm(upcast(y), y.shape[-1:], eps=eps).flatten(2) * upcast(weight) + upcast(bias)
    return (normed * F.silu(upcast(g))).to(g.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, l2wrap: float) -> tuple[Tensor, Tensor]:
    """Statistics [N, 3] of logits [N, V], which determine the cross-entropy at targets [N], and the
    gradient [N, V] of its sum.

    The statistics are the largest logit, Σ e^(logit − largest), and the logit at the target.
    The gradient is softmax − 1 at the target, plus l2wrap · max at the largest logit.
    """
    gradient, targets = logits.to(upcast(logits).dtype, copy=True), targets[:, None]
    top, argmax = gradient.max(1, keepdim=True)  # [N, 1]
    at_target = gradient.gather(1, targets)
    total = gradient.sub_(top).exp_().sum(1, keepdim=True)
    gradient.div_(total).scatter_add_(1, targets, torch.full_like(top, -1)).scatter_add_(1, argmax, top * l2wrap)
    return torch.cat([top, total, at_target], 1), gradient


def dropout(x: Tensor, seed: int | Tensor, p: float) -> Tensor:
    """x / (1 − p), or 0 with probability p.

    Element i is dropped if a 32-bit hash of i and the seed is below p · 2³².
    """
    numbers = torch.arange(x.numel(), device=x.device).bitwise_and_(0xFFFFFFFF)
    dropped = _scramble(_scramble(numbers).bitwise_xor_(seed & 0xFFFFFFFF)) < int(p * 2**32)
    return (upcast(x) * (1 / (1 - p))).masked_fill(dropped.view(x.shape), 0).to(x.dtype)


def _scramble(x: Tensor) -> Tensor:
    # MurmurHash3's finaliser on 32-bit integers stored in int64
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> shift) * factor & 0xFFFFFFFF  # overflow of int64 does not affect the lower 32 bits
    return x ^ x >> 16
