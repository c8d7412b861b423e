"""The elementwise operations of a block as plain formulas of torch: the oracle of the compiled ones, and their fallback.

All compute in fp32 (fp64 stays fp64) and round once, to the dtype of their input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dimension of x [..., D], in `dtype`."""
    x = wide(x)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps).to(dtype)


def mix(x: Tensor, last: Tensor, initial: Tensor, reset: Tensor | None, weights: Tensor) -> list[Tensor]:
    """m·x + (1 − m)·before for each m of weights [n, D]. `before` is the previous token: `last` [B, D] for
    the first token, `initial` [B, D] where `reset` [B, T] is True."""
    now = wide(x)  # once, so that gradients are summed in fp32 as well
    before = torch.cat([wide(last)[:, None], now[:, :-1]], 1)
    if reset is not None:
        before = torch.where(reset[..., None], wide(initial)[:, None], before)
    return [torch.lerp(before, now, m.to(now.dtype)).to(x.dtype) for m in weights]


def gate(r: Tensor, v: Tensor) -> Tensor:
    """σ(r)·v."""
    return (torch.sigmoid(wide(r)) * wide(v)).to(r.dtype)


def relu2(k: Tensor) -> Tensor:
    """max(k, 0)²."""
    return torch.relu(wide(k)).square().to(k.dtype)


def softmax(logits: Tensor, targets: Tensor, pull: float) -> tuple[Tensor, Tensor]:
    """Per token of logits [N, V] the largest, Σ e^(logit − largest), and the one at the target [N], together [N, 3]; and the gradient of the
    cross-entropy: softmax, less 1 at the target, plus pull · max at the largest logit."""
    gradient, targets = logits.to(wide(logits).dtype, copy=True), targets[:, None]
    top, argmax = gradient.max(1, keepdim=True)  # [N, 1]
    at_target = gradient.gather(1, targets)
    total = gradient.sub_(top).exp_().sum(1, keepdim=True)
    gradient.div_(total).scatter_add_(1, targets, torch.full_like(top, -1)).scatter_add_(1, argmax, top * pull)
    return torch.cat([top, total, at_target], 1), gradient


def dropout(x: Tensor, seed: int, p: float) -> Tensor:
    """x / (1 − p), or 0 with probability p: element i is dropped where a hash of i and the seed is below p · 2³²."""
    numbers = torch.arange(x.numel(), device=x.device).bitwise_and_(0xFFFFFFFF)
    dropped = _scramble(_scramble(numbers).bitwise_xor_(seed & 0xFFFFFFFF)) < int(p * 2**32)
    return (wide(x) * (1 / (1 - p))).masked_fill(dropped.view(x.shape), 0).to(x.dtype)


def _scramble(x: Tensor) -> Tensor:
    # MurmurHash3's finaliser on 32-bit numbers held in int64
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> shift) * factor & 0xFFFFFFFF  # the product wraps around 2⁶⁴, and its low half is right
    return x ^ x >> 16
