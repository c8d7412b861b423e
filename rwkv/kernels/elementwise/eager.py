"""The fused operations by torch's own, with the compiled unit's interface and its economy: what is kept is the same, what is in between is not.

For devices that the compiled unit does not reach. Formulas and gradients are those of cuda/fused.h.
"""

import torch
from torch import Tensor

from rwkv.kernels.elementwise import reference
from rwkv.kernels.elementwise.reference import dropout as dropout


def norm_forward(x: Tensor, w: Tensor, b: Tensor, eps: float, inside: torch.dtype) -> tuple[Tensor, Tensor]:
    """y in `inside`, and mean and 1/σ of every row, [N, 2]."""
    y, mean, scale = torch.native_layer_norm(x.float(), x.shape[-1:], w, b, eps)
    return y.to(inside), torch.stack([mean.flatten(), scale.flatten()], 1)


def norm_backward(
    gy: Tensor, past: Tensor | None, x: Tensor, w: Tensor, stats: Tensor, affine: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x (with `past`, what flows past the norm, added), w, b."""
    mean, scale = stats.t().contiguous().view(2, *x.shape[:-1], 1)
    gx, gw, gb = torch.ops.aten.native_layer_norm_backward(
        gy.float(), x.float(), x.shape[-1:], mean, scale, w, torch.zeros_like(w), [True, affine, affine]
    )
    return (gx if past is None else gx.add_(past)).to(x.dtype), gw, gb


def mix_forward(x: Tensor, last: Tensor, reset: Tensor | None, mix: Tensor) -> list[Tensor]:
    """As plain.mix."""
    return reference.mix(x, last, reset, mix)


def mix_backward(
    gy: list[Tensor], x: Tensor, last: Tensor, reset: Tensor | None, mix: Tensor, want_mix: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, of the token before the first, of the weights."""
    gx = sum(m * g for m, g in zip(mix, gy, strict=True))  # of the token itself
    before = sum((1 - m) * g for m, g in zip(mix, gy, strict=True))  # and of the one before it
    if reset is not None:
        before = before.masked_fill(reset[..., None], 0)
    gx[:, :-1] += before[:, 1:]
    gmix = None
    if want_mix:
        past = torch.cat([last[:, None], x[:, :-1]], 1)
        if reset is not None:
            past = past.masked_fill(reset[..., None], 0)
        change = x.float() - past
        gmix = torch.stack([(g * change).sum((0, 1)) for g in gy])
    return gx.to(x.dtype), before[:, 0].to(last.dtype), gmix


def gate_forward(x: Tensor | None, r: Tensor, v: Tensor) -> Tensor:
    """As plain.gate."""
    return reference.gate(r, v, x)


def gate_backward(g: Tensor, r: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of r and v."""
    on = torch.sigmoid(r.float())
    gv = g * on
    return (gv * v * (1 - on)).to(r.dtype), gv.to(v.dtype)


def relu2_forward(k: Tensor) -> Tensor:
    """As plain.relu2."""
    return reference.relu2(k)


def relu2_backward(g: Tensor, k: Tensor) -> Tensor:
    """Gradient of k."""
    return torch.relu(k).mul_(2).mul_(g)


def dropout_add(y: Tensor, x: Tensor, seed: int, p: float) -> None:
    """y += dropout(x)."""
    y += reference.dropout(x, seed, p)


def loss(logits: Tensor, target: Tensor, pull: float, gradient: bool) -> Tensor:
    """The largest logit, Σ e^(logit − largest) and the logit at the target, [N, 3]; with `gradient` the logits become theirs."""
    stats, found = reference.softmax(logits, target, pull)
    if gradient:
        logits.copy_(found)
    return stats
