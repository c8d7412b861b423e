"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048).

Shapes: B batch, T time (tokens), D n_embd, A dim_att, F dim_ffn, V vocab_size, L n_layer. Parameter
names are those of BlinkDL's checkpoints. The state of a block consists of the last input of its
time-mix [B, D], the WKV state [B, 3, A] in fp32 (rwkv.wkv), and the last input of its channel-mix
[B, D].

A tuned initial state, `att.time_state` [3, A], is the WKV state before the first token: numerator
aa, denominator bb, maximum exponent pp, as in PyPI's `rwkv`. A new one is all zeros, which is the
empty state; pp is only a scale and stays 0.

Activations saved for the backward pass, in bytes per token and block. e: bytes per element in
matmuls (2 in bf16); s: bytes per element of the residual stream (2 if the embedding is stored in
bf16, else 4):

    time-mix      s·D + 8    input, ln1's statistics
                  e·3A       k, v, r
                  0.75 A     WKV's state before every 16th token
    channel-mix   s·D + 8    input, ln2's statistics
                  e·F        input of the squared ReLU
                  e·2D       r, and the value that it gates

WKV also saves its initial state and on a CPU its final state, 12 A bytes per batch row each.
Outputs of norms, WKV and other elementwise operations are recomputed
(rwkv.kernels.elementwise.recompute). With grad_cp a block saves only its input (s·D), and one block
at a time is recomputed. Outside the blocks: s·D + 8 for ln_out, e·D for the gradient that head_loss
computes, and during head_loss the logits of one chunk (head_loss.chunk_tokens).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.kernels.elementwise import native
from rwkv.kernels.elementwise.recompute import recomputed
from rwkv.models import layers, parameters
from rwkv.models.layers import Device, dropout_of, matrix, mixing_weight, repeated
from rwkv.models.parameters import gain, position
from rwkv.models.parts import Parts
from rwkv.wkv import empty_state, wkv4

NAME = "4"
WARMUP_START = 0.2
PARTS = Parts(
    {"att": ("att.key", "att.value", "att.receptance"), "ffn": ("ffn.key", "ffn.receptance", "ffn.value")},
    ("att.output",),
    {
        "time": r"\.(att|ffn|ffnPre)\.time_(decay|first|mix_[kvr])$",
        "ln": r"\.ln[012]\.(weight|bias)$",
        "state": r"\.att\.time_state$",
    },
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of an RWKV-4 model. dim_att defaults to n_embd, dim_ffn to 4 · n_embd."""

    n_layer: int = 6
    n_embd: int = 512
    vocab_size: int = 65536
    dim_att: int = 0
    dim_ffn: int = 0
    pre_ffn: bool = False  # block 0 has a channel-mix instead of a time-mix
    time_state: bool = field(default=False, kw_only=True)  # documents begin with att.time_state

    def __post_init__(self):
        object.__setattr__(self, "dim_att", self.dim_att or self.n_embd)
        object.__setattr__(self, "dim_ffn", self.dim_ffn or 4 * self.n_embd)
        object.__setattr__(self, "pre_ffn", bool(self.pre_ffn))


PUBLISHED = {
    "0.1b": Sizes(12, 768),
    "0.4b": Sizes(24, 1024),
    "1.5b": Sizes(24, 2048),
    "3b": Sizes(32, 2560),
    "7b": Sizes(32, 4096),
    "14b": Sizes(40, 5120),
}


class TimeMix(nn.Module):
    """Computes r, k, v from each token and its predecessor; WKV over time; gated by σ(r)."""

    def __init__(self, sizes: Sizes, device: Device = None):
        super().__init__()
        D, A = sizes.n_embd, sizes.dim_att
        self.time_decay = nn.Parameter(torch.zeros(A, device=device))
        self.time_first = nn.Parameter(torch.zeros(A, device=device))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (mixing_weight(D, device) for _ in range(3))
        self.key, self.value, self.receptance = (matrix(A, D, device) for _ in range(3))
        self.output = matrix(D, A, device)
        self.time_state = nn.Parameter(torch.zeros(3, A, device=device)) if sizes.time_state else None

    def forward(self, x: Tensor, shift: Tensor, state: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D], shift [B, D], state [B, 3, A], reset [B, T] → y [B, T, D], state."""
        weights = [self.time_mix_k, self.time_mix_v, self.time_mix_r]
        drops = dropout_of(self.key, self.value, self.receptance)
        xk, xv, xr = native.mix(x, shift, reset, weights, drops=drops)
        k, v, r = self.key(xk), self.value(xv), self.receptance(xr)  # [B, T, A]
        initial = None
        if reset is not None and self.time_state is not None:
            initial = repeated(wkv_state(self.time_state), len(x))
        w = -torch.exp(self.time_decay.float())  # in fp32: bf16 would round exp(−exp(w)) to 1
        y, state = _wkv(w, self.time_first, k, v, state, reset, initial)
        return self.output(native.gate(r, y)), state


def _wkv(*inputs: Any) -> tuple[Tensor, Tensor]:
    """As `_wkv4`, but y is recomputed in the backward pass instead of saved."""
    y, state = _wkv4(*inputs)
    return recomputed(y, lambda *inputs: _wkv4(*inputs)[0], *inputs, several_uses=True), state


def _wkv4(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, reset: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As wkv4; `initial=None` is the empty state."""
    if reset is not None and initial is None:
        initial = empty_state(k.shape[0], k.shape[2], k.device)
    return wkv4(w, u, k, v, state, reset, initial=initial)


class ChannelMix(nn.Module):
    """Gated feed-forward network with squared ReLU, on each token and its predecessor."""

    def __init__(self, D: int, F: int, device: Device = None):
        super().__init__()
        self.time_mix_k, self.time_mix_r = mixing_weight(D, device), mixing_weight(D, device)
        self.key, self.receptance, self.value = matrix(F, D, device), matrix(D, D, device), matrix(D, F, device)

    def forward(self, x: Tensor, shift: Tensor, reset: Tensor | None = None) -> Tensor:
        """x [B, T, D], shift [B, D], reset [B, T] → y [B, T, D]."""
        weights, drops = [self.time_mix_k, self.time_mix_r], dropout_of(self.key, self.receptance)
        xk, xr = native.mix(x, shift, reset, weights, drops=drops)
        k, r = self.key(xk), self.receptance(xr)  # [B, T, F], [B, T, D]
        return native.gate(r, self.value(native.relu2(k)))


class Block(layers.Block):
    """layers.Block; with `pre_ffn`, block 0 has a channel-mix instead of its time-mix."""

    def __init__(self, sizes: Sizes, layer: int, device: Device = None):
        D, F = sizes.n_embd, sizes.dim_ffn
        super().__init__(D, layer, device)
        if layer == 0 and sizes.pre_ffn:
            self.ffnPre = ChannelMix(D, F, device)
        else:
            self.att = TimeMix(sizes, device)
        self.ffn = ChannelMix(D, F, device)

    def time_mix(
        self, x: Tensor, shift: Tensor, wkv: Tensor, carry: tuple[Tensor, ...], reset: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        if hasattr(self, "att"):
            return super().time_mix(x, shift, wkv, carry, reset)
        return self.ffnPre(x, shift, reset), wkv, carry


def initial_state(sizes: Sizes, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """See rwkv.models.version.Version, which also describes the functions below."""
    zeros = torch.zeros(batch, sizes.n_embd, device=like.device, dtype=like.dtype)
    return zeros, empty_state(batch, sizes.dim_att, like.device), zeros


def wkv_state(time_state: Tensor) -> Tensor:
    """Negative denominators count as 0: the average would have no bound. Their gradient is that of
    the denominator, so that they can grow again.
    """
    a, b, p = time_state.unbind(0)
    return torch.stack([a, b + (b.clamp(min=0) - b).detach(), p])


def recognise(shapes: Mapping[str, torch.Size], n_layer: int) -> Sizes:
    """Sizes from the shapes of emb, the first time_decay, and ffn.key of block 0."""
    pre_ffn = "blocks.0.ffnPre.key.weight" in shapes
    decays = [key for layer in range(n_layer) if (key := f"blocks.{layer}.att.time_decay") in shapes]
    matrices = ["emb.weight", "blocks.0.ffn.key.weight"]
    missing = [key for key in matrices if len(shapes.get(key, ())) != 2]
    if decays and len(shapes[decays[0]]) != 1:
        raise ValueError(f"{decays[0]} is not a vector")
    missing += [] if decays or pre_ffn else ["blocks.*.att.time_decay"]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    vocab_size, n_embd = shapes["emb.weight"]
    dim_att = shapes[decays[0]][0] if decays else n_embd
    dim_ffn = shapes["blocks.0.ffn.key.weight"][0]
    if not all((n_embd, vocab_size, dim_att, dim_ffn)):
        raise ValueError("a tensor has no elements")
    time_state = any(f"blocks.{layer}.att.time_state" in shapes for layer in range(n_layer))
    return Sizes(n_layer, n_embd, vocab_size, dim_att, dim_ffn, pre_ffn, time_state=time_state)


# matrices initialised to zero, so that every block is the identity
_ZERO = ("att.key", "att.receptance", "att.output", "ffn.value", "ffn.receptance", "ffnPre.value", "ffnPre.receptance")


def initialise(model: Any, emb_scale: float, frozen: bool) -> None:
    """BlinkDL's initial weights: small embeddings, zero or orthogonal matrices, decays spread over
    the channels.
    """
    L = len(model.blocks)
    for layer, block in enumerate(model.blocks):
        depth = layer / (L - 1) if L > 1 else 0.0  # from 0 in the first layer to 1 in the last
        height = 1 - layer / L  # from 1 in the first layer to 1/L in the last
        for part in block.children():
            if isinstance(part, TimeMix):
                _initialise_time_mix(part, depth, height)
            elif isinstance(part, ChannelMix):
                i = position(part.time_mix_k)
                part.time_mix_k.copy_(i**height)
                part.time_mix_r.copy_(i**height)
            elif isinstance(part, nn.LayerNorm):
                part.reset_parameters()
    model.ln_out.reset_parameters()
    for name, weight in model.named_parameters():
        if name == "emb.weight":
            weight.uniform_(-emb_scale, emb_scale)
        elif weight.dim() == 2 and not name.endswith("time_state"):
            _initialise_matrix(name.removesuffix(".weight"), weight, frozen)


def _initialise_time_mix(part: TimeMix, depth: float, height: float) -> None:
    A = part.time_decay.shape[0]
    h = torch.arange(A, dtype=torch.float64)
    part.time_decay.copy_(-5 + 8 * (h / max(A - 1, 1)) ** (0.7 + 1.3 * depth))
    zigzag = ((h + 1) % 3 - 1) * 0.5
    part.time_first.copy_(math.log(0.3) + zigzag)
    i = position(part.time_mix_k)
    part.time_mix_k.copy_(i**height)
    part.time_mix_v.copy_(i**height + 0.3 * depth)
    part.time_mix_r.copy_(i ** (0.5 * height))


def _initialise_matrix(name: str, weight: Tensor, frozen: bool) -> None:
    if name.endswith(_ZERO) and not frozen:
        weight.zero_()
    else:
        nn.init.orthogonal_(weight, gain=gain(weight) * (0.5 if name == "head" else 1.0))


def lr_scale(name: str, stage_2: bool) -> float:
    """2 for time_decay, 3 for time_first, 1 for others; in stage 2, 5 for all time_ parameters but
    initial states.
    """
    if stage_2 and "time_" in name and not name.endswith("time_state"):
        return 5.0
    return 2.0 if "time_decay" in name else 3.0 if "time_first" in name else 1.0


decays = parameters.decays


def saved_bytes(sizes: Sizes, e: int) -> float:
    """The sum of the table above, with s = e."""
    D, A, F = sizes.n_embd, sizes.dim_att, sizes.dim_ffn
    return e * (4 * D + F) + (3 * e + 0.75) * A + 16


def forward_bytes(sizes: Sizes, e: int) -> float:
    """In the channel-mix: input and output of the squared ReLU, and six tensors of width D."""
    return e * (2 * sizes.dim_ffn + 6 * sizes.n_embd)


def backward_bytes(sizes: Sizes, e: int) -> float:
    """Three gradients of the residual stream's width, and one of the channel-mix's."""
    return e * (3 * sizes.n_embd + sizes.dim_ffn)


def gpu_backward_bytes(sizes: Sizes, e: int, tokens: int, rows: int) -> float:
    """As on a CPU. (WKV's workspace has at most 3 MB.)"""
    return backward_bytes(sizes, e) * tokens
