"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048), parallel over time in training and token by token in generation.

Glossary of shapes: B batch, T time (tokens), D n_embd, A dim_att, F dim_ffn, V vocab_size, L n_layer.
Parameter names are those of BlinkDL's checkpoints, so that files go both ways.

Kept for the backward pass, in bytes per token and block, where products are computed in e bytes a number (2 in bf16) and the residual stream
has s (the embedding's: 2 if it is stored in bf16, else 4):

    time-mix      s·D + 8    its input, and the statistics of ln1       channel-mix   s·D + 8    its input, and the statistics of ln2
                  e·3A       k, v, r                                                  e·F        what is squared
                  0.75 A     WKV's states before every 16th token                     e·2D       r, and what it gates

WKV keeps its first state too, and on a CPU its last, 12 A bytes a row each. The same whatever is trained: outputs of norms and of WKV and inputs of products are formed again
(fused.Recipe). With grad_cp a block keeps s·D, its input, and one block at a time keeps the rest. Outside the blocks: s·D + 8 for ln_out, e·D for the
gradient that head_loss has formed, and while it runs the logits of one chunk (loss.CHUNK_BYTES as fp32).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv.kernels.elementwise import native
from rwkv.kernels.head_loss import head_loss
from rwkv.kernels.linear import Matrix
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


def _matrix(rows: int, columns: int) -> Matrix:
    return Matrix(columns, rows, bias=False)


def _mix(size: int) -> nn.Parameter:
    return nn.Parameter(torch.full((1, 1, size), 0.5))


class Norm(nn.LayerNorm):
    """LayerNorm whose statistics are fp32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, native.Recipe]:  # type: ignore[override]  # LayerNorm's is one
        """x [B, T, D] → its norm in the dtype that products are computed in; x as it was, to go on with; the norm's recipe (see fused.norm)."""
        return native.norm(x, self.weight, self.bias, self.eps)


class TimeMix(nn.Module):
    """r, k, v from the token and its predecessor; WKV over time; gated by σ(r)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        D, A = sizes.n_embd, sizes.dim_att
        self.time_decay = nn.Parameter(torch.zeros(A))
        self.time_first = nn.Parameter(torch.zeros(A))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = _mix(D), _mix(D), _mix(D)
        self.key, self.value, self.receptance, self.output = _matrix(A, D), _matrix(A, D), _matrix(A, D), _matrix(D, A)

    def forward(
        self, x: Tensor, shift: Tensor, state: Tensor, reset: Tensor | None = None, again: native.Recipe | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D] and its recipe, shift [B, D], state [B, 3, A], reset [B, T] → y [B, T, D], state."""
        mixed = native.mix(x, shift, reset, [self.time_mix_k, self.time_mix_v, self.time_mix_r], again)
        k, v, r = (
            layer(*one) for layer, one in zip((self.key, self.value, self.receptance), mixed, strict=True)
        )  # [B, T, A]
        # The decay stays fp32: exp(−exp(w)) is so near 1 that bf16 rounds it to 1.
        inputs = -torch.exp(self.time_decay.float()), self.time_first, k, v, state, reset
        y, state = wkv4(*inputs)
        recipe = native.Recipe(_wkv_again, tuple(None if t is None else t.detach() for t in inputs))
        return self.output(*native.gate(r, y, recipe)), state


def _wkv_again(*inputs: Tensor) -> Tensor:
    return wkv4(*inputs)[0]


class ChannelMix(nn.Module):
    """A gated feed-forward network with squared ReLU, fed by the token and its predecessor."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        D, F = sizes.n_embd, sizes.dim_ffn
        self.time_mix_k, self.time_mix_r = _mix(D), _mix(D)
        self.key, self.receptance, self.value = _matrix(F, D), _matrix(D, D), _matrix(D, F)

    def forward(
        self, x: Tensor, past: Tensor, shift: Tensor, reset: Tensor | None = None, again: native.Recipe | None = None
    ) -> Tensor:
        """x [B, T, D] and its recipe, past [B, T, D], shift [B, D], reset [B, T] → past + channel-mix(x) [B, T, D]."""
        k, r = native.mix(x, shift, reset, [self.time_mix_k, self.time_mix_r], again)
        k, r = self.key(*k), self.receptance(*r)  # [B, T, F], [B, T, D]
        return native.gate_onto(past, r, self.value(*native.relu2(k)))


class Block(nn.Module):
    """x += time-mix(ln1 x); x += channel-mix(ln2 x). Block 0 normalises the embedding first."""

    def __init__(self, sizes: Sizes, layer: int):
        super().__init__()
        D = sizes.n_embd
        if layer == 0:
            self.ln0 = Norm(D)
        self.ln1, self.ln2 = Norm(D), Norm(D)
        if layer == 0 and sizes.pre_ffn:
            self.ffnPre = ChannelMix(sizes)
        else:
            self.att = TimeMix(sizes)
        self.ffn = ChannelMix(sizes)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...], reset: Tensor | None = None, dropout: float = 0.0
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [B, T, D] → [B, T, D] and the state after the last token. `dropout` of what the time-mix and the channel-mix leave, as upstream's.

        States are plain tuples, as DeepSpeed 0.7.0's hooks rebuild those and no others.
        """
        state = BlockState(*state)
        if hasattr(self, "ln0"):
            x = self.ln0(x)[0]
        a, x, again = self.ln1(x)
        if hasattr(self, "att"):
            y, wkv = self.att(a, state.att_shift, state.wkv, reset, again)
            x = x + y
        else:
            x, wkv = self.ffnPre(a, x, state.att_shift, reset, again), state.wkv
        f, x, again = self.ln2(_dropped(x, dropout))
        # clones: a view of the last token would keep the others
        return _dropped(self.ffn(f, x, state.ffn_shift, reset, again), dropout), (
            a[:, -1].clone(),
            wkv,
            f[:, -1].clone(),
        )


def _checkpoint(
    block: Block, x: Tensor, state: tuple[Tensor, ...], reset: Tensor | None, dropout: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return checkpoint(block, x, state, reset, dropout, use_reentrant=False)


def _checkpoint_reentrantly(
    block: Block, x: Tensor, state: tuple[Tensor, ...], reset: Tensor | None, dropout: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    def flat(
        x: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:  # this form sees gradients of tensors alone, not of those in a tuple
        y, after = block(x, state, reset, dropout)
        return y, *after

    if not x.requires_grad:  # of a frozen embedding: this form computes gradients only where an input asks for one
        x = x.detach().requires_grad_()
    y, *after = checkpoint(flat, x, *state, use_reentrant=True)
    return y, tuple(after)


def _dropped(x: Tensor, p: float) -> Tensor:
    return native.drop(x, p) if p else x


class Head(Matrix):
    """Logits, or at once their loss: whatever reads the head's weight goes through its forward, where ZeRO-3 fetches it."""

    def forward(self, x: Tensor, targets: Tensor | None = None, counts: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x [..., D] → logits [..., V]; with targets the mean loss, as rwkv.kernels.head_loss.head_loss."""
        return super().forward(x) if targets is None else head_loss(x, self.weight, targets, counts)


class RWKV(nn.Module):
    """The language model. Matrices hold no values until rwkv.checkpoint or rwkv.models.init gives them some.

    `grad_cp`: recompute each block in the backward pass and keep only its input. `dropout`: in training, of the embedding and of the residual
    stream after every mix (upstream's --dropout).

    Attributes:
        reentrant: recompute in torch's reentrant form: the recomputed block's backward pass is one of its own, within the hooks around the block.
    """

    def __init__(self, sizes: Sizes, grad_cp: bool = False, dropout: float = 0.0):
        super().__init__()
        self.sizes, self.grad_cp, self.dropout = sizes, grad_cp, dropout
        self.reentrant = False
        self.emb = nn.Embedding.from_pretrained(torch.empty(sizes.vocab_size, sizes.n_embd), freeze=False)
        self.blocks = nn.ModuleList(Block(sizes, layer) for layer in range(sizes.n_layer))
        self.ln_out = Norm(sizes.n_embd)
        self.head = Head(sizes.n_embd, sizes.vocab_size, bias=False)

    def initial_state(self, batch: int, like: Tensor | None = None) -> list[BlockState]:
        """The state of a document's start, one per block, on the device and in the dtype of `like`; None: of the embedding, which must not be partitioned
        over ranks then."""
        D, A = self.sizes.n_embd, self.sizes.dim_att
        like = self.emb.weight if like is None else like
        zeros = torch.zeros(batch, D, device=like.device, dtype=like.dtype)
        return [BlockState(zeros, empty_state(batch, A, like.device), zeros) for _ in self.blocks]

    def hidden(
        self, tokens: Tensor, state: list[BlockState] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[BlockState]]:
        """tokens [B, T] of integers in [0, V) → what the head reads, [B, T, D], and the state after the last token.

        `reset` [B, T] bool: True where a document starts; nothing before that token reaches it or what follows.
        """
        dropout = self.dropout if self.training else 0.0
        x, after = self.emb(tokens), []
        if (
            state is None
        ):  # from the embedding's output: its weight, read here, ZeRO-3 would keep gathered for all of the pass
            state = self.initial_state(tokens.shape[0], x)
        x = _dropped(x, dropout)
        for block, before in zip(self.blocks, state, strict=True):
            if self.grad_cp and torch.is_grad_enabled():
                recompute = _checkpoint_reentrantly if self.reentrant else _checkpoint
                x, new = recompute(block, x, tuple(before), reset, dropout)
            else:
                x, new = block(x, tuple(before), reset, dropout)
            after.append(BlockState(*new))
        return self.ln_out(x)[0], after

    def forward(
        self, tokens: Tensor, state: list[BlockState] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[BlockState]]:
        """tokens [B, T] → logits [B, T, V] and the state after the last token, to be given back with the next tokens. As `hidden`."""
        x, state = self.hidden(tokens, state, reset)
        return self.head(x), state
