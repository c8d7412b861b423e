"""RWKV-6 (x060, "Finch"; Peng et al. 2024, arXiv:2404.05892).

Shapes: B batch, T time (tokens), D n_embd, A dim_att, F dim_ffn, V vocab_size, L n_layer, N
head_size, H = A/N heads, R and S the ranks of the token shift and of the decay. Parameter names are
those of BlinkDL's checkpoints. The state of a block consists of the last input of its time-mix
[B, D], the WKV state [B, H, N (key), N (value)] in fp32 (rwkv.wkv), and the last input of its
channel-mix [B, D].

Activations saved for the backward pass, in bytes per token and block, with e and s as in v4.py:

    time-mix      s·D + 8    input, ln1's statistics
                  e·(5R + S) between the low-rank matrices of the token shift, and of the decay
                  e·5A       r, k, v, g, WKV's output
                  N·A/16     WKV's state before every 64th token, in fp32
    channel-mix   s·D + 8    input, ln2's statistics
                  e·F        input of the squared ReLU
                  e·2D       r, and the value that it gates

All else is recomputed (rwkv.kernels.elementwise.recompute).
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.kernels.elementwise import native, shift
from rwkv.kernels.elementwise.recompute import checkpointed
from rwkv.kernels.elementwise.reference import upcast
from rwkv.kernels.linear import linear
from rwkv.models import gated_heads, layers, parameters
from rwkv.models.gated_heads import gated_wkv
from rwkv.models.layers import Device, HeadNorm, dropout_of, matrix, mixing_weight
from rwkv.models.parameters import initialise_matrices, position
from rwkv.wkv.wkv6 import empty_state
from rwkv.wkv.wkv6.native import workspace_bytes

NAME = "6"
WARMUP_START = 0.01
PARTS, lr_scale, decays = gated_heads.PARTS, gated_heads.lr_scale, parameters.decays
wkv_state = gated_heads.wkv_state


@dataclass(frozen=True)
class Sizes(gated_heads.Sizes):
    """Sizes of an RWKV-6 model. The ranks default to those of the published models."""

    rank_mix: int = 0  # R, of each of the five parts of the token shift
    rank_w: int = 0  # S, of the decay

    def __post_init__(self):
        super().__post_init__()
        large = self.n_embd >= 4096
        object.__setattr__(self, "rank_mix", self.rank_mix or (64 if large else 32))
        object.__setattr__(self, "rank_w", self.rank_w or (128 if large else 64))


PUBLISHED = {"1.6b": Sizes(24, 2048), "3b": Sizes(32, 2560), "7b": Sizes(32, 4096), "14b": Sizes(61, 4096)}


def _low_rank(*shape: int, device: Device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=device))


class TimeMix(nn.Module):
    """Computes w, k, v, r, g, each from its own mixture of a token and its predecessor, which
    depends on both; WKV over time, normalised by head; gated by g.
    """

    def __init__(self, sizes: Sizes, device: Device = None):
        super().__init__()
        D, A, R, S = sizes.n_embd, sizes.dim_att, sizes.rank_mix, sizes.rank_w
        self.time_maa_x, self.time_maa_w, self.time_maa_k = (mixing_weight(D, device) for _ in range(3))
        self.time_maa_v, self.time_maa_r, self.time_maa_g = (mixing_weight(D, device) for _ in range(3))
        self.time_maa_w1, self.time_maa_w2 = _low_rank(D, 5 * R, device=device), _low_rank(5, R, D, device=device)
        self.time_decay = nn.Parameter(torch.zeros(1, 1, A, device=device))
        self.time_decay_w1, self.time_decay_w2 = _low_rank(D, S, device=device), _low_rank(S, A, device=device)
        self.time_faaaa = nn.Parameter(torch.zeros(sizes.heads, sizes.head_size, device=device))
        self.receptance, self.key, self.value, self.gate = (matrix(A, D, device) for _ in range(4))
        self.output = matrix(D, A, device)
        self.ln_x = HeadNorm(A, device)
        self.time_state = gated_heads.initial_state_parameter(sizes, device)

    def forward(self, x: Tensor, last: Tensor, state: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D], last [B, D], state [B, H, N, N], reset [B, T] → y [B, T, D], state."""
        heads, mixtures = self.time_faaaa.shape, self._mixtures(x, last, reset)
        decay = torch.tanh(linear(next(mixtures), self.time_decay_w1.t()))  # [B, T, S]
        w = checkpointed(functools.partial(log_decay, heads), self.time_decay, decay, self.time_decay_w2)
        k, v = self.key(next(mixtures)), self.value(next(mixtures))  # [B, T, A]
        r, g = self.receptance(next(mixtures)), self.gate(next(mixtures))
        y, state = gated_wkv(r, w, k, v, g, self.time_faaaa, self.ln_x(), state, reset, self.time_state)
        return self.output(y), state

    def _mixtures(self, x: Tensor, last: Tensor, reset: Tensor | None) -> Iterator[Tensor]:
        """The mixtures of a token and its predecessor for w, k, v, r, g, [B, T, D]."""
        weight = 1 - self.time_maa_x
        weights = [self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g]
        if run := shift.kernels(x):  # without `before`
            (xx,) = native.mix(x, last, reset, [weight])
        else:
            before, xx = native.mix(x, last, reset, [torch.zeros_like(weight), weight])
        low = torch.tanh(linear(xx, self.time_maa_w1.t()))  # [B, T, 5 R]
        if run:
            drops = [0.0, *dropout_of(self.key, self.value, self.receptance, self.gate)]
            found = shift.shift(run, x, last, reset, weights, low, self.time_maa_w2, drops)
            while found:
                yield found.pop(0)  # not kept
            return
        parts = low.view(*low.shape[:2], 5, -1).unbind(2)
        for maa, part, up in zip(weights, parts, self.time_maa_w2, strict=True):
            yield checkpointed(mixed, x, before, maa, part, up)


def mixed(x: Tensor, before: Tensor, maa: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """x + (before − x) (maa + low · up): [B, T, D] twice, [1, 1, D], [B, T, R], [R, D] →
    [B, T, D].
    """
    return torch.lerp(upcast(x), upcast(before), upcast(linear(low, up.t())) + upcast(maa)).to(x.dtype)


def log_decay(heads: torch.Size, time_decay: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """−exp(time_decay + low · up): [1, 1, A], [B, T, S], [S, A] → [B, T, H, N] in fp32, as bf16
    would round a decay close to 1 to 1.
    """
    w = -torch.exp(upcast(time_decay) + upcast(linear(low, up.t())))
    return w.view(*w.shape[:2], *heads)


class ChannelMix(nn.Module):
    """Gated feed-forward network with squared ReLU, on each token and its predecessor."""

    def __init__(self, sizes: Sizes, device: Device = None):
        super().__init__()
        D, F = sizes.n_embd, sizes.dim_ffn
        self.time_maa_k, self.time_maa_r = mixing_weight(D, device), mixing_weight(D, device)
        self.key, self.receptance, self.value = matrix(F, D, device), matrix(D, D, device), matrix(D, F, device)

    def forward(self, x: Tensor, shift: Tensor, reset: Tensor | None = None) -> Tensor:
        """x [B, T, D], shift [B, D], reset [B, T] → y [B, T, D]."""
        weights = [1 - self.time_maa_k, 1 - self.time_maa_r]
        drops = dropout_of(self.key, self.receptance)
        xk, xr = native.mix(x, shift, reset, weights, drops=drops)
        k, r = self.key(xk), self.receptance(xr)  # [B, T, F], [B, T, D]
        return native.gate(r, self.value(native.relu2(k)))


class Block(layers.Block):
    """layers.Block with the mixes of this version."""

    def __init__(self, sizes: Sizes, layer: int, device: Device = None):
        super().__init__(sizes.n_embd, layer, device)
        self.att, self.ffn = TimeMix(sizes, device), ChannelMix(sizes, device)


def initial_state(sizes: Sizes, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """See rwkv.models.version.Version, also for all functions below."""
    zeros = torch.zeros(batch, sizes.n_embd, device=like.device, dtype=like.dtype)
    return zeros, empty_state(batch, sizes.heads, sizes.head_size, like.device), zeros


def recognise(shapes: Mapping[str, torch.Size], n_layer: int) -> Sizes:
    """Sizes from the shapes of emb, and of time_faaaa, ffn.key and the low-rank matrices of block
    0.
    """
    ranks = {"rank_mix": "blocks.0.att.time_maa_w2", "rank_w": "blocks.0.att.time_decay_w2"}
    needed = ["blocks.0.att.time_maa_x", "blocks.0.att.gate.weight", *ranks.values()]
    if missing := [key for key in needed if len(shapes.get(key, ())) < 2]:
        raise ValueError(f"no {', '.join(missing)}")
    found: dict[str, Any] = {name: shapes[key][-2] for name, key in ranks.items()}
    if not all(found.values()):
        raise ValueError("a tensor has no elements")
    return Sizes(**gated_heads.common_sizes(shapes, n_layer), **found)


def initialise(model: Any, emb_scale: float, frozen: bool) -> None:
    """BlinkDL's initial weights (RWKV-v5/src). The embedding is uniform in ±1e-4, whatever
    `emb_scale`.
    """
    L = len(model.blocks)
    for layer, block in enumerate(model.blocks):
        att, ffn = block.att, block.ffn
        depth = layer / (L - 1) if L > 1 else 0.0  # from 0 in the first block to 1 in the last
        height = 1 - layer / L  # from 1 in the first block to 1/L in the last
        i = position(att.time_maa_x)
        for mix in (att.time_maa_x, att.time_maa_w, att.time_maa_k):
            mix.copy_(1 - i**height)
        att.time_maa_v.copy_(1 - (i**height + 0.3 * depth))
        att.time_maa_r.copy_(1 - i ** (0.5 * height))
        att.time_maa_g.copy_(1 - i ** (0.5 * height))
        for down, up in ((att.time_maa_w1, att.time_maa_w2), (att.time_decay_w1, att.time_decay_w2)):
            down.zero_()
            up.uniform_(-0.01, 0.01)
        gated_heads.initialise_decay(att.time_decay, att.time_faaaa, att.ln_x, layer, L)
        ffn.time_maa_k.copy_(1 - i ** (height**3))
        ffn.time_maa_r.copy_(1 - i ** (height**3))
    initialise_matrices(model, frozen)


def saved_bytes(sizes: Sizes, e: int) -> float:
    """The sum of the table above, with s = e."""
    D, A, F = sizes.n_embd, sizes.dim_att, sizes.dim_ffn
    low = 5 * sizes.rank_mix + sizes.rank_w
    return e * (4 * D + 5 * A + F + low) + sizes.head_size * A / 16 + 16


def forward_bytes(sizes: Sizes, e: int) -> float:
    """The larger of the channel-mix's, as RWKV-4's, and the time-mix's, which mixes and normalises
    in fp32. Measured (tests/memory/test_estimate.py).
    """
    return max(e * (2 * sizes.dim_ffn + 6 * sizes.n_embd), 35 * sizes.n_embd)


def backward_bytes(sizes: Sizes, e: int) -> float:
    """The larger of the channel-mix's, as RWKV-4's, and of the time-mix's five tensors in fp32.
    Measured, as above.
    """
    return max(e * (3 * sizes.n_embd + sizes.dim_ffn), 4 * 5 * sizes.n_embd)


def gpu_backward_bytes(sizes: Sizes, e: int, tokens: int, rows: int) -> float:
    """The larger of what a CPU needs with WKV's workspace, and of the token shift's: for each of
    five mixtures its gradient, its weight and the weight's gradient; and x and its gradient.
    """
    wkv = workspace_bytes(rows * sizes.heads, sizes.head_size)
    return max(backward_bytes(sizes, e) * tokens + wkv, e * 17 * sizes.n_embd * tokens)
