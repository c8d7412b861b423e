"""Layers shared by versions: normalisation, uninitialised linear layers, dropout."""

import torch
from torch import Tensor, nn

from rwkv.kernels.elementwise import native
from rwkv.kernels.linear import Matrix

Device = torch.device | str | None


class Norm(nn.LayerNorm):
    """LayerNorm with fp32 statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → normalised x, in the dtype of matmuls."""
        return native.norm(x, self.weight, self.bias, self.eps)


class HeadNorm(nn.Module):
    """Weight and bias of the normalisation by head."""

    def __init__(self, size: int, device: Device = None):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(size, device=device)) for _ in range(2))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Copies of weight and bias. (ZeRO-3 gathers them only in forward, but parameters that it
        returns until the end of the pass.)
        """
        return self.weight.clone(), self.bias.clone()


def matrix(rows: int, columns: int, device: Device = None) -> Matrix:
    """A linear layer with weight [rows, columns], uninitialised."""
    return Matrix(columns, rows, bias=False, device=device)


def repeated(x: Tensor, batch: int) -> Tensor:
    """x [...] for every row of a batch: [batch, ...], a copy. (ZeRO-3 frees parameters after a
    module's forward pass.)
    """
    return x.unsqueeze(0).repeat(batch, *[1] * x.dim())


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout with probability p; returns x for p = 0."""
    return native.drop(x, p) if p else x
