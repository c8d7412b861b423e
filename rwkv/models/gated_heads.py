"""What RWKV-5 and RWKV-6 share: sizes, gated WKV with normalisation by head, initial decays,
parameter groups.

Sources: Peng et al. 2024, arXiv:2404.05892; BlinkDL's RWKV-LM/RWKV-v5/src.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.kernels.elementwise.by_head import gated_norm
from rwkv.models.layers import HeadNorm, check_heads, repeated
from rwkv.models.parts import Parts
from rwkv.wkv import wkv6

PARTS = Parts(
    {
        "att": ("att.receptance", "att.key", "att.value", "att.output", "att.gate"),
        "ffn": ("ffn.key", "ffn.value", "ffn.receptance"),
    },
    (),
    {
        "time": r"\.(att|ffn)\.time_(?!state$)\w+$",
        "ln": r"\.(ln[012]|ln_x)\.(weight|bias)$|^ln_out\.(weight|bias)$",
        "state": r"\.att\.time_state$",
    },
)
EPS = 64e-5  # of the normalisation by head


@dataclass(frozen=True)
class Sizes:
    """Sizes of an RWKV-5 or RWKV-6 model. dim_att defaults to n_embd, dim_ffn to 3.5 · n_embd.

    Raises:
        ValueError: head_size is not possible, or does not divide dim_att.
    """

    n_layer: int = 6
    n_embd: int = 512
    vocab_size: int = 65536
    dim_att: int = 0
    dim_ffn: int = 0
    head_size: int = 0
    time_state: bool = field(default=False, kw_only=True)  # documents begin with att.time_state

    def __post_init__(self):
        usual = {"dim_att": self.n_embd, "dim_ffn": max(32, self.n_embd * 7 // 64 * 32), "head_size": 64}
        for name, value in usual.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        check_heads(self.dim_att, self.head_size)

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.dim_att // self.head_size


def initial_state_parameter(sizes: Sizes, device: Any) -> nn.Parameter | None:
    """att.time_state [H, N (value), N (key)], as in upstream's files; None without one."""
    shape = sizes.heads, sizes.head_size, sizes.head_size
    return nn.Parameter(torch.zeros(shape, device=device)) if sizes.time_state else None


def wkv_state(time_state: Tensor) -> Tensor:
    """[H, N (key), N (value)], WKV's layout, from att.time_state."""
    return time_state.mT


def after_reset(time_state: Tensor | None, state: Tensor, reset: Tensor | None) -> Tensor | None:
    """WKV's state at the start of a document, for every batch row of `state`; None without
    resets.
    """
    if reset is None:
        return None
    return torch.zeros_like(state) if time_state is None else repeated(wkv_state(time_state), len(state))


def gated_wkv(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor,
    norm: tuple[Tensor, Tensor],
    state: Tensor,
    reset: Tensor | None,
    time_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """WKV over time, normalised by head, gated by g.

    Args:
        r, k, v, g: [B, T, A].
        w, u: log-decay [B, T, H, N] or [H, N], and bonus [H, N].
        norm: weight and bias of the normalisation [A].
        state: [B, H, N, N].
        reset: [B, T] bool, True where a document starts.
        time_state: the state at the start of a document, as in checkpoints; None: zeros.

    Returns:
        [B, T, A], and the state after the last token.
    """
    r, k, v = (t.view(*t.shape[:2], *u.shape) for t in (r, k, v))
    y, state = wkv6(r, w, k, v, u, state, reset, initial=after_reset(time_state, state, reset))
    return gated_norm(y, g, *norm, EPS), state


def initialise_decay(decay: Tensor, bonus: Tensor, norm: HeadNorm, layer: int, layers: int) -> None:
    """Initial decays spread over the channels, bonuses [H, N], and normalisation by head, of a
    block.
    """
    depth = layer / (layers - 1) if layers > 1 else 0.0  # from 0 in the first block to 1 in the last
    A = bonus.numel()
    n = torch.arange(A, dtype=torch.float64)
    ramp = n / max(A - 1, 1)
    decay.copy_((-6 + 5 * ramp ** (0.7 + 1.3 * depth)).view(decay.shape))
    bonus.copy_((depth * (1 - ramp) + 0.1 * ((n + 1) % 3 - 1)).view(bonus.shape))
    norm.weight.fill_(((1 + layer) / layers) ** 0.7)
    norm.bias.zero_()


def lr_scale(name: str, stage_2: bool) -> float:
    """2 for decays, 1 for others; in stage 2, 5 for decays, bonuses and mixing weights. Low-rank
    matrices and initial states always 1.
    """
    last = name.rpartition(".")[2]
    if not last.startswith("time_") or last.endswith(("_w1", "_w2", "_state")):
        return 1.0
    return 5.0 if stage_2 else 2.0 if last == "time_decay" else 1.0


def common_sizes(shapes: Any, n_layer: int) -> dict[str, Any]:
    """The fields of Sizes, from the shapes of emb, time_faaaa and ffn.key of block 0.

    Raises:
        ValueError: one of them is missing or empty.
    """
    needed = ["emb.weight", "blocks.0.att.time_faaaa", "blocks.0.ffn.key.weight"]
    if missing := [key for key in needed if len(shapes.get(key, ())) != 2]:
        raise ValueError(f"no {', '.join(missing)}")
    (vocab_size, n_embd), (heads, head_size), (dim_ffn, _) = (shapes[key] for key in needed)
    if not all((n_embd, vocab_size, dim_ffn, heads, head_size)):
        raise ValueError("a tensor has no elements")
    return {
        "n_layer": n_layer,
        "n_embd": n_embd,
        "vocab_size": vocab_size,
        "dim_att": heads * head_size,
        "dim_ffn": dim_ffn,
        "head_size": head_size,
        "time_state": "blocks.0.att.time_state" in shapes,
    }
