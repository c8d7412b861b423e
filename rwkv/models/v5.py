"""RWKV-5.2 (x052, "Eagle"; Peng et al. 2024, arXiv:2404.05892).

Shapes, parameter names and the state of a block are those of RWKV-6 (v6.py). Decays do not depend
on the token.

Activations saved for the backward pass, in bytes per token and block, with e and s as in v4.py:

    time-mix      s·D + 8    input, ln1's statistics
                  e·5A       r, k, v, g, WKV's output
                  N·A/16     WKV's state before every 64th token, in fp32
    channel-mix   s·D + 8    input, ln2's statistics
                  e·F        input of the squared ReLU
                  e·2D       r, and the value that it gates

All else is recomputed (rwkv.kernels.elementwise.recompute).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.kernels.elementwise import native
from rwkv.kernels.elementwise.reference import upcast
from rwkv.models import gated_heads, layers, parameters
from rwkv.models.gated_heads import gated_wkv
from rwkv.models.layers import Device, HeadNorm, dropout_of, matrix, mixing_weight
from rwkv.models.parameters import initialise_matrices, position
from rwkv.models.v4 import ChannelMix  # the same in RWKV-5
from rwkv.wkv.wkv6 import empty_state
from rwkv.wkv.wkv6.native import workspace_bytes

NAME = "5.2"
WARMUP_START = 0.01
PARTS, lr_scale, decays = gated_heads.PARTS, gated_heads.lr_scale, parameters.decays
wkv_state = gated_heads.wkv_state


@dataclass(frozen=True)
class Sizes(gated_heads.Sizes):
    """Sizes of an RWKV-5.2 model."""


PUBLISHED = {"0.4b": Sizes(24, 1024), "1.5b": Sizes(24, 2048), "3b": Sizes(32, 2560), "7b": Sizes(32, 4096)}


class TimeMix(nn.Module):
    """Computes k, v, r, g from each token and its predecessor; WKV over time, normalised by head;
    gated by g.
    """

    def __init__(self, sizes: Sizes, device: Device = None):
        super().__init__()
        D, A = sizes.n_embd, sizes.dim_att
        self.time_mix_k, self.time_mix_v = mixing_weight(D, device), mixing_weight(D, device)
        self.time_mix_r, self.time_mix_g = mixing_weight(D, device), mixing_weight(D, device)
        heads = sizes.heads, sizes.head_size
        self.time_decay, self.time_faaaa = (nn.Parameter(torch.zeros(heads, device=device)) for _ in range(2))
        self.receptance, self.key, self.value, self.gate = (matrix(A, D, device) for _ in range(4))
        self.output = matrix(D, A, device)
        self.ln_x = HeadNorm(A, device)
        self.time_state = gated_heads.initial_state_parameter(sizes, device)

    def forward(self, x: Tensor, shift: Tensor, state: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D], shift [B, D], state [B, H, N, N], reset [B, T] → y [B, T, D], state."""
        k_drop, v_drop, r_drop, g_drop = dropout_of(self.key, self.value, self.receptance, self.gate)
        xk, xv = native.mix(x, shift, reset, [self.time_mix_k, self.time_mix_v], drops=[k_drop, v_drop])
        xr, xg = native.mix(x, shift, reset, [self.time_mix_r, self.time_mix_g], drops=[r_drop, g_drop])
        k, v, r, g = self.key(xk), self.value(xv), self.receptance(xr), self.gate(xg)  # [B, T, A]
        w = -torch.exp(upcast(self.time_decay))  # in fp32: bf16 would round exp(−exp(w)) to 1
        y, state = gated_wkv(r, w, k, v, g, self.time_faaaa, self.ln_x(), state, reset, self.time_state)
        return self.output(y), state


class Block(layers.Block):
    """layers.Block with the mixes of this version."""

    def __init__(self, sizes: Sizes, layer: int, device: Device = None):
        super().__init__(sizes.n_embd, layer, device)
        self.att, self.ffn = TimeMix(sizes, device), ChannelMix(sizes.n_embd, sizes.dim_ffn, device)


def initial_state(sizes: Sizes, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """See rwkv.models.version.Version, also for all functions below."""
    zeros = torch.zeros(batch, sizes.n_embd, device=like.device, dtype=like.dtype)
    return zeros, empty_state(batch, sizes.heads, sizes.head_size, like.device), zeros


def recognise(shapes: Mapping[str, torch.Size], n_layer: int) -> Sizes:
    """Sizes from the shapes of emb, time_faaaa and ffn.key of block 0. (RWKV-5.0 has no gate, 5.1
    one decay per head.)
    """
    if missing := [key for name in ("gate.weight", "time_mix_g") if (key := f"blocks.0.att.{name}") not in shapes]:
        raise ValueError(f"no {', '.join(missing)}")
    decay = tuple(shapes.get("blocks.0.att.time_decay", ()))
    if len(decay) != 2 or decay[1] == 1:
        raise ValueError(f"blocks.0.att.time_decay is {list(decay)}, not [heads, head size]")
    return Sizes(**gated_heads.common_sizes(shapes, n_layer))


def initialise(model: Any, emb_scale: float, frozen: bool) -> None:
    """BlinkDL's initial weights (RWKV-v5/src). The embedding is uniform in ±1e-4, whatever
    `emb_scale`.
    """
    L = len(model.blocks)
    for layer, block in enumerate(model.blocks):
        att, ffn = block.att, block.ffn
        depth = layer / (L - 1) if L > 1 else 0.0  # from 0 in the first block to 1 in the last
        height = 1 - layer / L  # from 1 in the first block to 1/L in the last
        i = position(att.time_mix_k)
        for mix in (att.time_mix_k, ffn.time_mix_k, ffn.time_mix_r):
            mix.copy_(i**height)
        att.time_mix_v.copy_(i**height + 0.3 * depth)
        att.time_mix_r.copy_(i ** (0.5 * height))
        att.time_mix_g.copy_(i ** (0.5 * height))
        gated_heads.initialise_decay(att.time_decay, att.time_faaaa, att.ln_x, layer, L)
    initialise_matrices(model, frozen)


def saved_bytes(sizes: Sizes, e: int) -> float:
    """The sum of the table above, with s = e."""
    D, A, F = sizes.n_embd, sizes.dim_att, sizes.dim_ffn
    return e * (4 * D + 5 * A + F) + sizes.head_size * A / 16 + 16


def forward_bytes(sizes: Sizes, e: int) -> float:
    """The larger of the channel-mix's, as RWKV-4's, and the time-mix's, which normalises in fp32.
    Measured (tests/memory/test_estimate.py).
    """
    return max(e * (2 * sizes.dim_ffn + 6 * sizes.n_embd), 30 * sizes.n_embd)


def backward_bytes(sizes: Sizes, e: int) -> float:
    """The larger of the channel-mix's, as RWKV-4's, and of the time-mix's five tensors in fp32.
    Measured, as above.
    """
    return max(e * (3 * sizes.n_embd + sizes.dim_ffn), 4 * 5 * sizes.n_embd)


def gpu_backward_bytes(sizes: Sizes, e: int, tokens: int, rows: int) -> float:
    """As on a CPU, and WKV's workspace."""
    return backward_bytes(sizes, e) * tokens + workspace_bytes(rows * sizes.heads, sizes.head_size)
