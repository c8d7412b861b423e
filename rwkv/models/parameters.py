"""Rules for parameters shared by versions: initial values, weight decay."""

import math

import torch
from torch import Tensor, nn


def position(mix: Tensor) -> Tensor:
    """i/D for channel i, in the shape of the mixing weights [1, 1, D]."""
    return (torch.arange(mix.shape[-1], dtype=torch.float64) / mix.shape[-1]).view(1, 1, -1)


def gain(weight: Tensor) -> float:
    """The gain of an orthogonal matrix in upstream's trainers: √(rows / columns), at least 1."""
    rows, columns = weight.shape
    return math.sqrt(max(1.0, rows / columns))


# of RWKV-5 and later: matrices initialised to zero, so that every block is the identity; and those
# of gain 0.1
_ZERO = (".att.output.weight", ".ffn.value.weight", ".ffn.receptance.weight")
_SMALL = (".att.key.weight", ".att.gate.weight")


def initialise_matrices(model: nn.Module, frozen: bool) -> None:
    """Embedding, head, linear layers and LayerNorms of RWKV-5 and later. The embedding is uniform
    in ±1e-4.
    """
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
    for name, weight in model.named_parameters():
        if name == "emb.weight":
            weight.uniform_(-1e-4, 1e-4)
        elif name == "head.weight":
            nn.init.orthogonal_(weight, gain=0.5 * gain(weight))
        elif name.endswith(_ZERO) and not frozen:
            weight.zero_()
        elif name.endswith(".weight") and weight.dim() == 2:
            nn.init.orthogonal_(weight, gain=0.1 if name.endswith(_SMALL) else 1.0)


def decays(name: str, shape: torch.Size) -> bool:
    """True for linear layers, embedding and head; False for vectors, also those stored as
    [1, 1, D], and low-rank matrices.
    """
    return name.endswith(".weight") and sum(size > 1 for size in shape) >= 2
