"""The optimizer of --optimizer muon: Muon for the linear layers of the blocks, AdamW for the rest.

Muon (Jordan 2024, kellerjordan.github.io/posts/muon) replaces the update of a matrix by one that is
nearly orthogonal: about the same size in all directions. Scaled as by Liu et al. 2025
(arXiv:2502.16982), its root mean square is about that of AdamW's, so AdamW's learning rate and
weight decay can be kept. For a weight W [n, m] with gradient G:

    M ← μ M + (1 − μ) G
    W ← (1 − rate · decay) W − rate · 0.2 √max(n, m) · orthogonal(μ M + (1 − μ) G)

As torch.optim.Muon with adjust_lr_fn="match_rms_adamw", which torch 1.13.1 lacks.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.adapters import lora
from rwkv.kernels import adamw
from rwkv.train.loop.closure import evaluate

MOMENTUM = 0.95  # μ
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_TINY = 1e-7  # lower bound of the norm


def orthogonal(x: Tensor) -> Tensor:
    """Make a matrix nearly orthogonal by a Newton-Schulz iteration: x = U S Vᵀ → U S' Vᵀ, where S'
    is 0.68 to 1.14 for singular values of at least 1/100 of the Frobenius norm, and smaller for
    smaller ones.

    Args:
        x: [n, m], fp32 or bf16, which is the type of the matmuls.

    Returns:
        [n, m] in the dtype of x. Zeros for zeros.
    """
    y = x.t() if x.shape[0] > x.shape[1] else x
    y = y / torch.linalg.vector_norm(y, dtype=torch.float32).clamp(min=_TINY).to(y.dtype)
    for _ in range(_ITERATIONS):
        square = y @ y.t()
        y = torch.addmm(y, torch.addmm(square, square, square, beta=_B, alpha=_C), y, beta=_A)
    return y.t() if x.shape[0] > x.shape[1] else y


class Muon(torch.optim.Optimizer):
    """Muon on the parameters for which lora.is_hidden is true, AdamW with fp32 moments on the
    others; all are fp32.

    Args:
        groups: with keys `params` and `names`.
        dtype: of the matmuls of `orthogonal`.
        options: lr, betas and eps; the latter two are AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **options: Any):
        super().__init__(groups, {"weight_decay": 0.0, **options})
        self.dtype = dtype
        self._unclipped: dict[torch.device, Tensor] = {}  # the clipping factor 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As torch.optim.Optimizer.step."""
        loss = evaluate(closure)
        for group in self.param_groups:
            for p, name in zip(group["params"], group["names"], strict=True):
                if p.grad is not None:
                    update = self._muon if lora.is_hidden(name, p.shape) else self._adamw
                    update(p, p.grad, group)
        return loss

    def _muon(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonal(gradient.lerp(state["momentum"], MOMENTUM).to(self.dtype))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))

    def _adamw(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(adamw.new_state(p, quantised=False))
        if p.device not in self._unclipped:
            self._unclipped[p.device] = torch.ones(1, device=p.device)
        options = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        adamw.step(p.data, gradient, state, self._unclipped[p.device], 0, *options)
