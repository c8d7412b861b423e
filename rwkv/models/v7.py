"""RWKV-7 (x070, "Goose"; Peng et al. 2025, arXiv:2503.14456).

Shapes: B batch, T time (tokens), C n_embd, F dim_ffn, V vocab_size, L n_layer, N head_size, H = C/N
heads, R ranks. Parameter names are those of BlinkDL's checkpoints. The state of a block consists of
the last input of its time-mix [B, C], the WKV state [B, H, N (value), N (key)] in fp32 (rwkv.wkv),
and the last input of its channel-mix [B, C]. Blocks pass the value of block 0 (v_first) to the
blocks after them.

Activations saved for the backward pass, in bytes per token and block, with e and s as in v4.py:

    time-mix      s·C + 8    input, ln1's statistics
                  e·7C       outputs of the linear layers: r, k, v, g, and of w, a and the share of
                             v_first; v_first itself is the v of block 0
                  e·R        between the two matrices of each low-rank pair
                  e·2C       WKV's output, the output layer's input
                  N·C/4      WKV's state before every 16th token, in fp32
    channel-mix   s·C + 8    input, ln2's statistics
                  e·F        input of the squared ReLU

All else is recomputed (rwkv.kernels.elementwise.recompute, rwkv.wkv.wkv7.time_mix).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.kernels.elementwise import native
from rwkv.kernels.linear import linear
from rwkv.models import layers, parameters
from rwkv.models.layers import Device, HeadNorm, check_heads, dropout_of, matrix, repeated
from rwkv.models.parameters import gain, initialise_matrices, position
from rwkv.models.parts import Parts
from rwkv.wkv.wkv7 import empty_state
from rwkv.wkv.wkv7.native import workspace_bytes
from rwkv.wkv.wkv7.time_mix import Parameters, Projections, time_mix

NAME = "7"
WARMUP_START = 0.01
PARTS = Parts(
    {"att": ("att.receptance", "att.key", "att.value", "att.output"), "ffn": ("ffn.key", "ffn.value")},
    (),
    {
        # without v0, v1, v2 of block 0, which are not used
        "time": r"(?<!blocks\.0)\.att\.v[012]$|\.att\.(x_[rwkvag]|[wa][012]|g[12]|k_k|k_a|r_k)$|\.ffn\.x_k$",
        "ln": r"\.(ln[012]|ln_x)\.(weight|bias)$|^ln_out\.(weight|bias)$",
        "state": r"\.att\.time_state$",
    },
    low_rank=r"\.att\.[wavg][12]$",
)
EPS = 64e-5  # of the normalisation by head


@dataclass(frozen=True)
class Sizes:
    """Sizes of an RWKV-7 model. dim_ffn defaults to 4 · n_embd, the ranks to those of the published
    models.

    Raises:
        ValueError: head_size is not possible, or does not divide n_embd.
    """

    n_layer: int = 6
    n_embd: int = 512
    vocab_size: int = 65536
    dim_ffn: int = 0
    head_size: int = 0
    rank_w: int = 0  # of the decay
    rank_a: int = 0  # of the in-context learning rate
    rank_v: int = 0  # of the share of v_first
    rank_g: int = 0  # of the gate
    v_in_block_0: bool = False  # block 0 has v0, v1 and v2, unused, as in files of upstream's trainer
    time_state: bool = field(default=False, kw_only=True)  # documents begin with att.time_state

    def __post_init__(self):
        C = self.n_embd
        usual = {
            "dim_ffn": 4 * C,
            "head_size": 64,
            "rank_w": _rank(1.8 * C**0.5),
            "rank_a": _rank(1.8 * C**0.5),
            "rank_v": _rank(1.3 * C**0.5),
            "rank_g": _rank(0.6 * C**0.8),
        }
        for name, value in usual.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        check_heads(C, self.head_size)

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.n_embd // self.head_size


def _rank(size: float) -> int:
    """The multiple of 32 next to `size`, at least 32."""
    return max(32, round(size / 32) * 32)


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
    """Computes r, w, k, v, a, g from each token and its predecessor; WKV over time, normalised by
    head; gated by g.
    """

    x_r: Tensor
    x_w: Tensor
    x_k: Tensor
    x_v: Tensor
    x_a: Tensor
    x_g: Tensor
    w0: Tensor
    w1: Tensor
    w2: Tensor
    a0: Tensor
    a1: Tensor
    a2: Tensor
    v0: Tensor
    v1: Tensor
    v2: Tensor
    g1: Tensor
    g2: Tensor

    def __init__(self, sizes: Sizes, layer: int, device: Device = None):
        super().__init__()
        C = sizes.n_embd
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
        self.r_k = _parameter(sizes.heads, sizes.head_size, device=device)
        self.receptance, self.key, self.value, self.output = (matrix(C, C, device) for _ in range(4))
        self.ln_x = HeadNorm(C, device)
        # [H, N (value), N (key)], as in upstream's files
        shape = sizes.heads, sizes.head_size, sizes.head_size
        self.time_state = _parameter(*shape, device=device) if sizes.time_state else None

    def forward(
        self, x: Tensor, shift: Tensor, state: Tensor, v_first: Tensor | None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, C], shift [B, C], state [B, H, N, N], v_first [B, T, C] (None in block 0), reset
        [B, T] → y [B, T, C], state, v_first.
        """
        found = self._project(x, shift, v_first is not None, reset)
        v0 = None if v_first is None else self.v0
        weight, bias = self.ln_x()
        vectors = Parameters(weight, bias, self.r_k, self.w0, self.a0, v0, self.k_k, self.k_a)
        initial = None if self.time_state is None or reset is None else repeated(self.time_state, len(x))
        y, state = time_mix(found, v_first, vectors, state, reset, initial, eps=EPS)
        return self.output(y), state, found.v if v_first is None else v_first

    def _project(self, x: Tensor, shift: Tensor, later: bool, reset: Tensor | None) -> Projections:
        """The outputs of the linear layers; `later`: not in block 0."""
        r_drop, k_drop, v_drop = dropout_of(self.receptance, self.key, self.value)
        first, second = [1 - self.x_r, 1 - self.x_w, 1 - self.x_k], [1 - self.x_v, 1 - self.x_a, 1 - self.x_g]
        xr, xw, xk = native.mix(x, shift, reset, first, drops=[r_drop, 0, k_drop])
        xv, xa, xg = native.mix(x, shift, reset, second, drops=[v_drop, 0, 0])
        return Projections(
            r=self.receptance(xr),
            g=_low_rank(xg, self.g1, self.g2, torch.sigmoid),
            k=self.key(xk),
            v=self.value(xv),
            w=_low_rank(xw, self.w1, self.w2, torch.tanh),
            a=_low_rank(xa, self.a1, self.a2),
            mix=_low_rank(xv, self.v1, self.v2) if later else None,
        )


def _low_rank(x: Tensor, down: Tensor, up: Tensor, between: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """between(x · down) · up: [..., C], [C, R], [R, C] → [..., C]."""
    low = linear(x, down.t())
    return linear(between(low) if between else low, up.t())


class ChannelMix(nn.Module):
    """Feed-forward network with squared ReLU, on each token and its predecessor."""

    def __init__(self, sizes: Sizes, device: Device = None):
        super().__init__()
        C = sizes.n_embd
        self.x_k = _parameter(1, 1, C, device=device)
        self.key, self.value = matrix(sizes.dim_ffn, C, device), matrix(C, sizes.dim_ffn, device)

    def forward(self, x: Tensor, shift: Tensor, reset: Tensor | None = None) -> Tensor:
        """x [B, T, C], shift [B, C], reset [B, T] → y [B, T, C]."""
        (xk,) = native.mix(x, shift, reset, [1 - self.x_k], drops=dropout_of(self.key))
        return self.value(native.relu2(self.key(xk)))


class Block(layers.Block):
    """layers.Block with the mixes of this version; passes v_first on."""

    def __init__(self, sizes: Sizes, layer: int, device: Device = None):
        super().__init__(sizes.n_embd, layer, device)
        self.att, self.ffn = TimeMix(sizes, layer, device), ChannelMix(sizes, device)

    def time_mix(
        self, x: Tensor, shift: Tensor, wkv: Tensor, carry: tuple[Tensor, ...], reset: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """As in layers.Block; `carry` is (v_first,), in block 0 ()."""
        y, wkv, v_first = self.att(x, shift, wkv, *(carry or (None,)), reset)
        return y, wkv, (v_first,)


def initial_state(sizes: Sizes, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """See rwkv.models.version.Version, also for all functions below."""
    zeros = torch.zeros(batch, sizes.n_embd, device=like.device, dtype=like.dtype)
    return zeros, empty_state(batch, sizes.heads, sizes.head_size, like.device), zeros


def wkv_state(time_state: Tensor) -> Tensor:
    """att.time_state has WKV's layout."""
    return time_state


def recognise(shapes: Mapping[str, torch.Size], n_layer: int) -> Sizes:
    """Sizes from the shapes of emb, r_k and ffn.key of block 0, and the low-rank matrices of the
    last block.
    """
    last = f"blocks.{n_layer - 1}.att."
    ranks = {name: f"{last}{name}1" for name in ("wavg" if n_layer > 1 else "wag")}
    if "blocks.0.att.v1" in shapes:
        ranks["v"] = f"{last}v1"
    needed = ["emb.weight", "blocks.0.att.r_k", "blocks.0.ffn.key.weight", *ranks.values()]
    missing = [key for key in needed if len(shapes.get(key, ())) != 2]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    vocab_size, n_embd = shapes["emb.weight"]
    heads, head_size = shapes["blocks.0.att.r_k"]
    dim_ffn = shapes["blocks.0.ffn.key.weight"][0]
    found: dict[str, Any] = {f"rank_{name}": shapes[key][1] for name, key in ranks.items()}
    if not all((n_embd, vocab_size, dim_ffn, heads, head_size, *found.values())):
        raise ValueError("a tensor without elements")
    if heads * head_size != n_embd:
        raise ValueError(f"blocks.0.att.r_k is [{heads}, {head_size}], but the width is {n_embd}")
    kept = {"v_in_block_0": "blocks.0.att.v1" in shapes, "time_state": "blocks.0.att.time_state" in shapes}
    return Sizes(n_layer, n_embd, vocab_size, dim_ffn, head_size, **found, **kept)


def initialise(model: Any, emb_scale: float, frozen: bool) -> None:
    """BlinkDL's initial weights (RWKV-v7/train_temp). The embedding is uniform in ±1e-4, whatever
    `emb_scale`.
    """
    L = len(model.blocks)
    for layer, block in enumerate(model.blocks):
        depth = layer / (L - 1) if L > 1 else 0.0  # from 0 in the first layer to 1 in the last
        _initialise_time_mix(block.att, layer, L, depth)
        block.ffn.x_k.copy_(1 - position(block.ffn.x_k) ** ((1 - layer / L) ** 4))
    initialise_matrices(model, frozen)


def _initialise_time_mix(att: TimeMix, layer: int, layers: int, depth: float) -> None:
    height = 1 - layer / layers  # from 1 in the first layer to 1/L in the last
    i = position(att.x_r)
    C, N = i.shape[-1], att.r_k.shape[1]
    for name, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
        getattr(att, f"x_{name}").copy_(1 - i ** (power * height))
    n = torch.arange(C, dtype=torch.float64).view(1, 1, -1)
    ramp, z = n / max(C - 1, 1) - 0.5, ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = z * z.abs()
    att.w0.copy_(-6 + 6 * (n / max(C - 1, 1)) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
    att.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * ramp)
    if hasattr(att, "v0"):
        att.v0.copy_(0.73 - 0.4 * ramp)
    for name in "wavg":
        if hasattr(att, f"{name}1"):
            getattr(att, f"{name}1").zero_()
            up = getattr(att, f"{name}2")
            nn.init.orthogonal_(up, gain=0.1 * gain(up))
    att.k_k.copy_(0.71 - 0.1 * ramp)
    att.k_a.fill_(1.02)
    att.r_k.fill_(-0.04)
    att.ln_x.weight.fill_(((1 + layer) / layers) ** 0.7)
    att.ln_x.bias.zero_()


def lr_scale(name: str, stage_2: bool) -> float:
    """2 for w0, in stage 2 5; 1 for others."""
    return (5.0 if stage_2 else 2.0) if name.endswith(".att.w0") else 1.0


decays = parameters.decays


def saved_bytes(sizes: Sizes, e: int) -> float:
    """The sum of the table above, with s = e."""
    ranks = sizes.rank_w + sizes.rank_a + sizes.rank_v + sizes.rank_g
    return e * (11 * sizes.n_embd + ranks + sizes.dim_ffn) + sizes.head_size * sizes.n_embd / 4 + 16


def forward_bytes(sizes: Sizes, e: int) -> float:
    """In the time-mix: ten tensors between the linear layers, and others in fp32. Measured
    (tests/memory/test_estimate.py).
    """
    return (10 * e + 46) * sizes.n_embd


def backward_bytes(sizes: Sizes, e: int) -> float:
    """The larger of the channel-mix's, as RWKV-4's, and the time-mix's, which is recomputed in
    fp32. Measured, as above.
    """
    return max(e * (3 * sizes.n_embd + sizes.dim_ffn), 4 * 22 * sizes.n_embd)


def gpu_backward_bytes(sizes: Sizes, e: int, tokens: int, rows: int) -> float:
    """As on a CPU, and WKV's workspace. (The CUDA kernels of the time-mix need less.)"""
    return backward_bytes(sizes, e) * tokens + workspace_bytes(rows * sizes.heads, sizes.head_size)
