"""RWKV-7 (x070, "Goose"; Peng et al. 2025, arXiv:2503.14456), parallel over time in training and token by token in
generation.

Shapes: B batch, T time (tokens), C n_embd, F dim_ffn, V vocab_size, L n_layer, N head_size, H = C/N heads, R rank.
Parameter names are those of BlinkDL's checkpoints. The state of a block is the last input of its time-mix [B, C], that of
WKV [B, H, N (value), N (key)] in fp32 (rwkv.wkv), and the last input of its channel-mix [B, C]. Blocks hand the value of
block 0 (v_first) to the blocks after them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv.kernels.elementwise import native
from rwkv.kernels.linear import linear
from rwkv.models.layers import Device, Norm, dropout, matrix
from rwkv.models.parts import Parts
from rwkv.wkv import wkv7
from rwkv.wkv.wkv7 import empty_state

NAME = "7"
PARTS = Parts(
    {
        "att": ("att.receptance", "att.key", "att.value", "att.output"),
        "ffn": ("ffn.key", "ffn.value"),
    },
    (),
    {
        # without v0, v1, v2 of block 0, which are not used
        "time": r"(?<!blocks\.0)\.att\.v[012]$|\.att\.(x_[rwkvag]|[wa][012]|g[12]|k_k|k_a|r_k)$|\.ffn\.x_k$",
        "ln": r"\.(ln[012]|ln_x|ln_out)\.(weight|bias)$|^ln_out\.(weight|bias)$",
    },
)
EPS = 64e-5  # of the GroupNorm after WKV


@dataclass(frozen=True)
class Sizes:
    """The sizes of an RWKV-7. 0 for dim_ffn is 4 n_embd; 0 for a rank is that of the published models."""

    n_layer: int = 6
    n_embd: int = 512
    vocab_size: int = 65536
    dim_ffn: int = 0
    head_size: int = 64
    rank_w: int = 0  # decay
    rank_a: int = 0  # in-context learning rate
    rank_v: int = 0  # value residual
    rank_g: int = 0  # gate
    v_in_block_0: bool = False  # block 0 has v0, v1, v2, which are not used: in files of upstream's trainer

    def __post_init__(self):
        C = self.n_embd

        def multiple_of_32(rank: float) -> int:
            return max(32, round(rank / 32) * 32)

        ranks = {"w": 1.8 * C**0.5, "a": 1.8 * C**0.5, "v": 1.3 * C**0.5, "g": 0.6 * C**0.8}
        for name, rank in ranks.items():
            object.__setattr__(self, f"rank_{name}", getattr(self, f"rank_{name}") or multiple_of_32(rank))
        object.__setattr__(self, "dim_ffn", self.dim_ffn or 4 * C)
        object.__setattr__(self, "head_size", self.head_size or 64)

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.n_embd // self.head_size


PUBLISHED = {
    "0.1b": Sizes(12, 768),
    "0.4b": Sizes(24, 1024, rank_g=128),
    "1.5b": Sizes(24, 2048),
    "2.9b": Sizes(32, 2560),
    "7.2b": Sizes(32, 4096),
    "13.3b": Sizes(61, 4096, rank_w=192, rank_a=192, rank_v=128, rank_g=384),
}


def _parameter(*shape: int, device: Device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, device=device))


class TimeMix(nn.Module):
    """r, w, k, v, a, g from the token and its predecessor; WKV over time; normalised by head and gated."""

    def __init__(self, sizes: Sizes, layer: int, device: Device = None):
        super().__init__()
        C, self.N = sizes.n_embd, sizes.head_size
        for name in "rwkvag":
            setattr(self, f"x_{name}", _parameter(1, 1, C, device=device))
        for name, rank in (("w", sizes.rank_w), ("a", sizes.rank_a), ("v", sizes.rank_v), ("g", sizes.rank_g)):
            if name == "v" and layer == 0 and not sizes.v_in_block_0:
                continue
            if name != "g":
                setattr(self, f"{name}0", _parameter(1, 1, C, device=device))
            setattr(self, f"{name}1", _parameter(C, rank, device=device))
            setattr(self, f"{name}2", _parameter(rank, C, device=device))
        if layer == 0 and sizes.v_in_block_0:
            for parameter in (self.v0, self.v1, self.v2):
                parameter.requires_grad_(False)
        self.k_k, self.k_a = _parameter(1, 1, C, device=device), _parameter(1, 1, C, device=device)
        self.r_k = _parameter(sizes.heads, self.N, device=device)
        self.receptance, self.key, self.value, self.output = (matrix(C, C, device) for _ in range(4))
        self.ln_x = nn.GroupNorm(sizes.heads, C, eps=EPS, device=device)

    def forward(
        self, x: Tensor, shift: Tensor, state: Tensor, v_first: Tensor | None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C], shift [B, C], state [B, H, N, N], v_first [B, T, C], reset [B, T] → y [B, T, C], state, v_first."""
        empty = torch.zeros_like(shift)
        xr, xw, xk = native.mix(x, shift, reset, [1 - self.x_r, 1 - self.x_w, 1 - self.x_k], empty)
        xv, xa, xg = native.mix(x, shift, reset, [1 - self.x_v, 1 - self.x_a, 1 - self.x_g], empty)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # log-decay between −e^(−1/2) and 0, in fp32: bf16 would round a decay close to 1 to 1
        w = -math.exp(-0.5) * torch.sigmoid(self.w0.float() + _low_rank(torch.tanh, xw, self.w1, self.w2).float())
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + _low_rank(None, xv, self.v1, self.v2))
        a = torch.sigmoid(self.a0 + _low_rank(None, xa, self.a1, self.a2))  # in-context learning rate
        g = _low_rank(torch.sigmoid, xg, self.g1, self.g2)
        kk = F.normalize(self._heads(k * self.k_k), dim=-1, eps=1e-12)  # removal key
        k = k * (1 + (a - 1) * self.k_a)
        r, w, k, v, a = map(self._heads, (r, w, k, v, a))
        y, state = self._wkv(r, w, *(z.to(r.dtype) for z in (k, v, -kk, kk * a)), state, reset)
        y = self._norm(y) + ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)
        return self.output(y * g), state, v_first

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, C] → [B, T, H, N]."""
        return x.unflatten(-1, (-1, self.N))

    def _wkv(self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, reset: Tensor | None):
        # a document starts with the empty state
        initial = None if reset is None else empty_state(r.shape[0], r.shape[2], self.N, r.device)
        return wkv7(r, w, k, v, a, b, state, reset, initial=initial)

    def _norm(self, y: Tensor) -> Tensor:
        """[B, T, H, N] → [B, T, C], normalised by head, in fp32."""
        B, T, H, _ = y.shape
        y = F.group_norm(y.reshape(B * T, -1).float(), H, self.ln_x.weight.float(), self.ln_x.bias.float(), EPS)
        return y.view(B, T, -1)


def _low_rank(between: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """between(x · down) · up: [..., C], [C, R], [R, C] → [..., C]."""
    low = linear(x, down.t())
    return linear(low if between is None else between(low), up.t())


class ChannelMix(nn.Module):
    """A feed-forward network with squared ReLU, of the token and its predecessor."""

    def __init__(self, sizes: Sizes, device: Device = None):
        super().__init__()
        C = sizes.n_embd
        self.x_k = _parameter(1, 1, C, device=device)
        self.key, self.value = matrix(sizes.dim_ffn, C, device), matrix(C, sizes.dim_ffn, device)

    def forward(self, x: Tensor, shift: Tensor, reset: Tensor | None = None) -> Tensor:
        """x [B, T, C], shift [B, C], reset [B, T] → y [B, T, C]."""
        (xk,) = native.mix(x, shift, reset, [1 - self.x_k], torch.zeros_like(shift))
        return self.value(native.relu2(self.key(xk)))


class Block(nn.Module):
    """x += time-mix(ln1 x); x += channel-mix(ln2 x). Block 0 first normalises the embedding."""

    def __init__(self, sizes: Sizes, layer: int, device: Device = None):
        super().__init__()
        C = sizes.n_embd
        if layer == 0:
            self.ln0 = Norm(C, device=device)
        self.ln1, self.ln2 = Norm(C, device=device), Norm(C, device=device)
        self.att, self.ffn = TimeMix(sizes, layer, device), ChannelMix(sizes, device)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, ...],
        carry: tuple[Tensor, ...] = (),
        reset: Tensor | None = None,
        p: float = 0.0,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """x [B, T, C] → [B, T, C], the state after the last token, and v_first; p: dropout of the residual stream."""
        att_shift, wkv, ffn_shift = state
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        a = self.ln1(x)
        y, wkv, v_first = self.att(a, att_shift, wkv, *(carry or (None,)), reset)
        x = dropout(x + y, p)
        f = self.ln2(x)
        x = dropout(x + self.ffn(f, ffn_shift, reset), p)
        # clones: a view of the last token would keep the others in memory
        return x, (a[:, -1].clone(), wkv, f[:, -1].clone()), (v_first,)


def initial_state(sizes: Sizes, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """See rwkv.models.version.Version, as all functions below."""
    zeros = torch.zeros(batch, sizes.n_embd, device=like.device, dtype=like.dtype)
    return zeros, empty_state(batch, sizes.heads, sizes.head_size, like.device), zeros


_LATER = {  # versions that are not supported, by a part of the name of a tensor
    r"\.ffn\.enn\.": "RWKV-8",
    r"\.qkv\.": "RWKV-7b (DEA attention)",
    r"\.ffn\.s_emb": "RWKV-7a (DeepEmbed)",
}


def recognise(shapes: Mapping[str, torch.Size], n_layer: int) -> Sizes:
    """Sizes from the shapes of emb, r_k and ffn.key of block 0, and of the low-rank matrices of the last block."""
    for pattern, name in _LATER.items():
        if any(re.search(pattern, key) for key in shapes):
            raise ValueError(f"it is {name}, which is not supported")
    last = f"blocks.{n_layer - 1}.att."
    needed = ["emb.weight", "blocks.0.att.r_k", "blocks.0.ffn.key.weight", *(f"{last}{x}1" for x in "wag")]
    if n_layer > 1:
        needed.append(f"{last}v1")
    missing = [key for key in needed if len(shapes.get(key, ())) != 2]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    vocab_size, n_embd = shapes["emb.weight"]
    heads, head_size = shapes["blocks.0.att.r_k"]
    dim_ffn = shapes["blocks.0.ffn.key.weight"][0]
    ranks = {f"rank_{x}": shapes[f"{last}{x}1"][1] for x in "wavg" if f"{last}{x}1" in shapes}
    if not all((n_embd, vocab_size, dim_ffn, *ranks.values())):
        raise ValueError("a tensor without elements")
    if heads * head_size != n_embd:
        raise ValueError(f"blocks.0.att.r_k is [{heads}, {head_size}], and the width is {n_embd}")
    return Sizes(
        n_layer, n_embd, vocab_size, dim_ffn, head_size, **ranks, v_in_block_0="blocks.0.att.v1" in shapes
    )


def initialise(model: Any, emb_scale: float, frozen: bool) -> None:
    """BlinkDL's initial weights (RWKV-v7/train_temp); the embedding is uniform in ±1e-4, whatever `emb_scale`."""
    L = len(model.blocks)
    for layer, block in enumerate(model.blocks):
        for part in block.children():
            if isinstance(part, nn.LayerNorm):
                part.reset_parameters()
        depth = layer / (L - 1) if L > 1 else 0.0  # 0 in the first layer, 1 in the last
        _initialise_time_mix(block.att, layer, L, depth)
        block.ffn.x_k.copy_(1 - _position(block.ffn.x_k) ** ((1 - layer / L) ** 4))
    model.ln_out.reset_parameters()
    for name, weight in model.named_parameters():
        if name == "emb.weight":
            weight.uniform_(-1e-4, 1e-4)
        elif name == "head.weight":
            rows, columns = weight.shape
            nn.init.orthogonal_(weight, gain=0.5 * (math.sqrt(rows / columns) if rows > columns else 1.0))
        elif name.endswith((".att.output.weight", ".ffn.value.weight")) and not frozen:
            weight.zero_()
        elif name.endswith(".weight") and weight.dim() == 2:
            nn.init.orthogonal_(weight, gain=0.1 if name.endswith(".att.key.weight") else 1.0)


def _position(mix: Tensor) -> Tensor:
    """i/C for channel i, shaped as the mixing weights [1, 1, C]."""
    return (torch.arange(mix.shape[-1], dtype=torch.float64) / mix.shape[-1]).view(1, 1, -1)


def _initialise_time_mix(att: TimeMix, layer: int, layers: int, depth: float) -> None:
    height = 1 - layer / layers  # 1 in the first layer, 1/L in the last
    position = _position(att.x_r)
    C, N = position.shape[-1], att.N
    for name, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
        getattr(att, f"x_{name}").copy_(1 - position ** (power * height))
    n = torch.arange(C, dtype=torch.float64).view(1, 1, -1)
    linear_, z = n / max(C - 1, 1) - 0.5, ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = z * z.abs()
    att.w0.copy_(-6 + 6 * (n / max(C - 1, 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
    att.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * linear_)
    if hasattr(att, "v0"):
        att.v0.copy_(0.73 - 0.4 * linear_)
    for name in "wavg":
        if hasattr(att, f"{name}1"):
            getattr(att, f"{name}1").zero_()
            up = getattr(att, f"{name}2")
            rows, columns = up.shape
            nn.init.orthogonal_(up, gain=0.1 * (math.sqrt(rows / columns) if rows > columns else 1.0))
    att.k_k.copy_(0.71 - 0.1 * linear_)
    att.k_a.fill_(1.02)
    att.r_k.fill_(-0.04)
    att.ln_x.weight.fill_(((1 + layer) / layers) ** 0.7)
    att.ln_x.bias.zero_()


def lr_scale(name: str, stage_2: bool) -> float:
    """2 for the decay w0 (5 in stage 2), 1 for the rest."""
    return (5.0 if stage_2 else 2.0) if name.endswith(".att.w0") else 1.0


def decays(name: str, shape: torch.Size) -> bool:
    """The weights of linear layers, the embedding and the head decay; nothing else does."""
    return name.endswith(".weight") and sum(size > 1 for size in shape) >= 2


def saved_bytes(sizes: Sizes, e: int) -> float:
    """Measured on tensors (tests/models/test_v7.py): about 30 values per channel and token, and the ffn's."""
    return e * (30 * sizes.n_embd + sizes.dim_ffn)


def transformers_config(sizes: Sizes) -> dict[str, Any]:
    """transformers has no RWKV-7."""
    raise ValueError("transformers has no RWKV-7")
