"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048), parallel over time in training and token by token in generation.

Glossary of shapes: B batch, T time (tokens), D n_embd, A dim_att, F dim_ffn, V vocab_size, L n_layer.
Parameter names are those of BlinkDL's checkpoints, so that files go both ways.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from rwkv.wkv import empty_state, wkv4


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint's shapes say about the model."""

    n_layer: int
    n_embd: int
    vocab_size: int
    dim_att: int
    dim_ffn: int
    pre_ffn: bool = False  # block 0 has a second channel-mix in the place of its time-mix


class BlockState(NamedTuple):
    """What a block carries from one token to the next."""

    att_shift: Tensor  # [B, D] the last input of the time-mix
    wkv: Tensor  # [B, 3, A] fp32, see rwkv.wkv
    ffn_shift: Tensor  # [B, D] the last input of the channel-mix


def _matrix(rows: int, columns: int) -> nn.Linear:
    # Memory without values: they come from a checkpoint or from rwkv.model.init, and a 14b model should not be filled twice.
    return skip_init(nn.Linear, columns, rows, bias=False)


def _mix(size: int) -> nn.Parameter:
    return nn.Parameter(torch.full((1, 1, size), 0.5))


def _shift(x: Tensor, last: Tensor, reset: Tensor | None) -> Tensor:
    """Each token's predecessor [B, T, D]; the first one's is `last` [B, D], and zero where a document starts."""
    before = torch.cat([last.to(x.dtype)[:, None], x[:, :-1]], 1)
    return before if reset is None else before.masked_fill(reset[..., None], 0)


class TimeMix(nn.Module):
    """r, k, v from the token and its predecessor; WKV over time; gated by σ(r)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        D, A = sizes.n_embd, sizes.dim_att
        self.time_decay = nn.Parameter(torch.zeros(A))
        self.time_first = nn.Parameter(torch.zeros(A))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = _mix(D), _mix(D), _mix(D)
        self.key, self.value, self.receptance, self.output = _matrix(A, D), _matrix(A, D), _matrix(A, D), _matrix(D, A)

    def forward(self, x: Tensor, shift: Tensor, state: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D], shift [B, D], state [B, 3, A], reset [B, T] → y [B, T, D], state."""
        before = _shift(x, shift, reset)
        k = self.key(torch.lerp(before, x, self.time_mix_k))  # [B, T, A]
        v = self.value(torch.lerp(before, x, self.time_mix_v))
        r = self.receptance(torch.lerp(before, x, self.time_mix_r))
        # The decay stays fp32: exp(−exp(w)) is so near 1 that bf16 rounds it to 1.
        y, state = wkv4(-torch.exp(self.time_decay.float()), self.time_first, k, v, state, reset)
        return self.output(torch.sigmoid(r) * y), state


class ChannelMix(nn.Module):
    """A gated feed-forward network with squared ReLU, fed by the token and its predecessor."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        D, F = sizes.n_embd, sizes.dim_ffn
        self.time_mix_k, self.time_mix_r = _mix(D), _mix(D)
        self.key, self.receptance, self.value = _matrix(F, D), _matrix(D, D), _matrix(D, F)

    def forward(self, x: Tensor, shift: Tensor, reset: Tensor | None = None) -> Tensor:
        """x [B, T, D], shift [B, D], reset [B, T] → [B, T, D]."""
        before = _shift(x, shift, reset)
        k = self.key(torch.lerp(before, x, self.time_mix_k))  # [B, T, F]
        r = self.receptance(torch.lerp(before, x, self.time_mix_r))
        return torch.sigmoid(r) * self.value(torch.relu(k).square())


class Block(nn.Module):
    """x += time-mix(ln1 x); x += channel-mix(ln2 x). Block 0 normalises the embedding first."""

    def __init__(self, sizes: Sizes, layer: int):
        super().__init__()
        D = sizes.n_embd
        if layer == 0:
            self.ln0 = nn.LayerNorm(D)
        self.ln1, self.ln2 = nn.LayerNorm(D), nn.LayerNorm(D)
        if layer == 0 and sizes.pre_ffn:
            self.ffnPre = ChannelMix(sizes)
        else:
            self.att = TimeMix(sizes)
        self.ffn = ChannelMix(sizes)

    def forward(self, x: Tensor, state: BlockState, reset: Tensor | None = None) -> tuple[Tensor, BlockState]:
        """x [B, T, D] → [B, T, D] and the state after the last token."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        a = self.ln1(x)
        if hasattr(self, "att"):
            y, wkv = self.att(a, state.att_shift, state.wkv, reset)
        else:
            y, wkv = self.ffnPre(a, state.att_shift, reset), state.wkv
        x = x + y
        f = self.ln2(x)
        x = x + self.ffn(f, state.ffn_shift, reset)
        return x, BlockState(a[:, -1], wkv, f[:, -1])


class RWKV(nn.Module):
    """The language model. Matrices hold no values until rwkv.checkpoint or rwkv.model.init gives them some.

    `grad_cp`: recompute each block in the backward pass and keep only its input.
    """

    def __init__(self, sizes: Sizes, grad_cp: bool = False):
        super().__init__()
        self.sizes, self.grad_cp = sizes, grad_cp
        self.emb = skip_init(nn.Embedding, sizes.vocab_size, sizes.n_embd)
        self.blocks = nn.ModuleList(Block(sizes, layer) for layer in range(sizes.n_layer))
        self.ln_out = nn.LayerNorm(sizes.n_embd)
        self.head = _matrix(sizes.vocab_size, sizes.n_embd)

    def initial_state(self, batch: int) -> list[BlockState]:
        """The state of a document's start, one per block."""
        D, A = self.sizes.n_embd, self.sizes.dim_att
        weight = self.emb.weight
        zeros = torch.zeros(batch, D, device=weight.device, dtype=weight.dtype)
        return [BlockState(zeros, empty_state(batch, A, weight.device), zeros) for _ in self.blocks]

    def hidden(self, tokens: Tensor, state: list[BlockState] | None = None, reset: Tensor | None = None) -> tuple[Tensor, list[BlockState]]:
        """tokens [B, T] of integers in [0, V) → what the head reads, [B, T, D], and the state after the last token.

        `reset` [B, T] bool: True where a document starts; nothing before that token reaches it or what follows.
        """
        if state is None:
            state = self.initial_state(tokens.shape[0])
        x, after = self.emb(tokens), []
        for block, before in zip(self.blocks, state, strict=True):
            if self.grad_cp and torch.is_grad_enabled():
                x, new = checkpoint(block, x, before, reset, use_reentrant=False)
            else:
                x, new = block(x, before, reset)
            after.append(new)
        return self.ln_out(x), after

    def forward(
        self, tokens: Tensor, state: list[BlockState] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[BlockState]]:
        """tokens [B, T] → logits [B, T, V] and the state after the last token, to be given back with the next tokens. As `hidden`."""
        x, state = self.hidden(tokens, state, reset)
        return self.head(x), state
