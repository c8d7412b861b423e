"""The initial weights of RWKV-4, by BlinkDL's rules: small embeddings, zero or orthogonal matrices, decays spread over the layers."""

import math

import torch
from torch import Tensor, nn

from rwkv.models.v4 import RWKV, ChannelMix, TimeMix

# Matrices that start at zero, so that at first every block passes its input on.
_ZERO = ("att.key", "att.receptance", "att.output", "ffn.value", "ffn.receptance", "ffnPre.value", "ffnPre.receptance")


@torch.no_grad()
def initialise(model: RWKV, emb_scale: float, frozen: bool = False) -> None:
    """Fill every weight in place.

    Args:
        emb_scale: the embedding is uniform in ±emb_scale; upstream takes the initial learning rate.
        frozen: the matrices will not be trained: then none starts at zero, as no gradient would ever pass it.
    """
    L = len(model.blocks)
    for layer, block in enumerate(model.blocks):
        depth = layer / (L - 1) if L > 1 else 0.0  # 0 in the first layer, 1 in the last
        height = 1 - layer / L  # 1 in the first layer, 1/L in the last
        for part in block.children():
            if isinstance(part, TimeMix):
                _time_mix(part, depth, height)
            elif isinstance(part, ChannelMix):
                position = _position(part.time_mix_k)
                part.time_mix_k.copy_(position**height)
                part.time_mix_r.copy_(position**height)
            elif isinstance(part, nn.LayerNorm):
                part.reset_parameters()
    model.ln_out.reset_parameters()
    for name, weight in model.named_parameters():
        if name == "emb.weight":
            weight.uniform_(-emb_scale, emb_scale)
        elif weight.dim() == 2:
            _matrix(name.removesuffix(".weight"), weight, frozen)


def _position(mix: Tensor) -> Tensor:
    """i/D for channel i, shaped as the mixing weights [1, 1, D]."""
    return (torch.arange(mix.shape[-1], dtype=torch.float64) / mix.shape[-1]).view(1, 1, -1)


def _time_mix(part: TimeMix, depth: float, height: float) -> None:
    A = part.time_decay.shape[0]
    h = torch.arange(A, dtype=torch.float64)
    part.time_decay.copy_(-5 + 8 * (h / max(A - 1, 1)) ** (0.7 + 1.3 * depth))
    zigzag = ((h + 1) % 3 - 1) * 0.5
    part.time_first.copy_(math.log(0.3) + zigzag)
    position = _position(part.time_mix_k)
    part.time_mix_k.copy_(position**height)
    part.time_mix_v.copy_(position**height + 0.3 * depth)
    part.time_mix_r.copy_(position ** (0.5 * height))


def _matrix(name: str, weight: Tensor, frozen: bool) -> None:
    rows, columns = weight.shape
    gain = math.sqrt(rows / columns) if rows > columns else 1.0
    if name.endswith(_ZERO) and not frozen:
        weight.zero_()
    else:
        nn.init.orthogonal_(weight, gain=gain * (0.5 if name == "head" else 1.0))
