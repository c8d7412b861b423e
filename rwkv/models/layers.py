"""Layers shared by versions: normalisation, uninitialised linear layers, dropout, and the block
around time-mix and channel-mix.
"""

import torch
from torch import Tensor, nn

from rwkv.kernels.elementwise import native
from rwkv.kernels.linear import Matrix
from rwkv.wkv import heads

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
        """Copies of weight and bias. ZeRO-3 frees parameters after forward; those that forward
        returned would stay gathered until the end of the pass.
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


def dropout_of(*layers: nn.Module) -> list[float]:
    """The probability of dropout of each layer's input in its adapter, 0 without one; for
    native.mix and shift.shift, in the order in which the layers are called. Under ZeRO-3 0: its
    hooks pass a layer another tensor, which has lost what the token shift computed with it.
    """
    return [0.0 if _sharded(layer) else getattr(layer, "input_dropout", 0.0) for layer in layers]


def _sharded(layer: nn.Module) -> bool:
    return any(native.is_sharded(parameter) for parameter in layer.parameters(recurse=False))


def check_heads(width: int, head_size: int) -> None:
    """Raise ValueError if a width cannot be divided into heads of this size."""
    if not heads.valid_size(head_size):
        raise ValueError(f"the head size is {head_size}; it must be a multiple of 16, at most {heads.MAX_SIZE}")
    if width % head_size:
        raise ValueError(f"the width {width} is not a multiple of the head size {head_size}")


def mixing_weight(size: int, device: Device = None) -> nn.Parameter:
    """A weight of a token and its predecessor, by channel [1, 1, D]."""
    return nn.Parameter(torch.full((1, 1, size), 0.5, device=device))


class Block(nn.Module):
    """x += time-mix(ln1 x); x += channel-mix(ln2 x). Block 0 first normalises the embedding.

    Versions add `ffn`, the channel-mix, and either `att`, a time-mix with
    att(x, shift, state, reset) -> (y, state), or their own `time_mix`.
    """

    att: nn.Module
    ffn: nn.Module

    def __init__(self, size: int, layer: int, device: Device = None):
        super().__init__()
        if layer == 0:
            self.ln0 = Norm(size, device=device)
        self.ln1, self.ln2 = Norm(size, device=device), Norm(size, device=device)

    def time_mix(
        self, x: Tensor, shift: Tensor, wkv: Tensor, carry: tuple[Tensor, ...], reset: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The output of the time-mix [B, T, D], the WKV state after the last token, and `carry`."""
        y, wkv = self.att(x, shift, wkv, reset)
        return y, wkv, carry

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, ...],
        carry: tuple[Tensor, ...] = (),
        reset: Tensor | None = None,
        p: float = 0.0,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """x [B, T, D] → [B, T, D], the state after the last token, and `carry` for the next block.

        Args:
            state: the last input of the time-mix, the WKV state, and the last input of the
                channel-mix.
            carry: what the previous block passes on; () in block 0.
            reset: bool [B, T], True at the first token of a document.
            p: dropout probability of the residual stream.
        """
        att_shift, wkv, ffn_shift = state
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        a = self.ln1(x)
        y, wkv, carry = self.time_mix(a, att_shift, wkv, carry, reset)
        x = dropout(x + y, p)
        f = self.ln2(x)
        x = dropout(x + self.ffn(f, ffn_shift, reset), p)
        # a view of the last token would keep the whole tensor in memory
        return x, (a[:, -1].clone(), wkv, f[:, -1].clone()), carry
