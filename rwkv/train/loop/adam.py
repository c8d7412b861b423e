"""Fused Adam for CPUs: one pass over memory in a compiled kernel.

See cuda/elementwise/adam_cpu_loops.h. torch's Adam makes about ten passes, and allocates two
temporary tensors per parameter.
"""

import torch
from torch import Tensor

from rwkv.kernels import bf16_copy, load
from rwkv.train.loop.closure import evaluate
from rwkv.train.runtime import fused_adam


def supports(groups: list[dict]) -> bool:
    """Whether the kernel is available and supports all parameters of these groups: fp32 on a CPU,
    contiguous.
    """
    if fused_adam.on_gpus(groups):
        return False
    parameters = [p for group in groups for p in group["params"]]
    fit = all(p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    return fit and load.why_unavailable() is None


class FusedAdam(torch.optim.Adam):
    """torch's Adam (AdamW if `decoupled`) with the same state; updates differ by fp32 rounding
    only. A step also writes the bf16 copies of weights (rwkv.kernels.bf16_copy).

    amsgrad and maximize are not supported: `step` raises ValueError.

    Attributes:
        clip: factor for the gradients in the next step only.
    """

    clip = 1.0

    def __init__(self, groups: list[dict], decoupled: bool, **options):
        super().__init__(groups, **options)
        self.decoupled = decoupled

    @torch.no_grad()
    def step(self, closure=None):
        """As torch.optim.Adam.step."""
        loss = evaluate(closure)
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("FusedAdam does not support amsgrad or maximize")
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        self.clip = 1.0
        return loss

    def _update(self, p: Tensor, gradient: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        moments = state["exp_avg"], state["exp_avg_sq"]
        hyperparameters = (
            float(state["step"]),
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            self.decoupled,
            self.clip,
        )
        torch.ops.rwkv.adam(p, gradient.contiguous(), *moments, *hyperparameters, bf16_copy.memory(p))
        bf16_copy.written(p)
