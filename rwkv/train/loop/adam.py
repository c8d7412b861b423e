"""Adam on a CPU in one pass over memory, by the compiled unit (cuda/adam_cpu_loops.h).

torch's has some ten passes over weights, gradients and moments, and room for two tensors like the largest, whose pages are new in every step.
"""

import torch
from torch import Tensor

from rwkv import compat
from rwkv.kernels import load


def takes(groups: list[dict]) -> bool:
    """Whether the unit is compiled and all parameters of these groups are for it: fp32 on a CPU, contiguous."""
    if compat.on_gpus(groups):
        return False
    parameters = [p for group in groups for p in group["params"]]
    fit = all(p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)
    return fit and load.why_unavailable() is None


class OnePass(torch.optim.Adam):
    """torch's Adam, or AdamW if decoupled, and its state; steps differ by fp32 rounding. Without amsgrad and maximize: ValueError.

    Attributes:
        clip: what the next step multiplies gradients by, and that step alone.
    """

    clip = 1.0

    def __init__(self, groups: list[dict], decoupled: bool, **options):
        super().__init__(groups, **options)
        self.decoupled = decoupled

    @torch.no_grad()
    def step(self, closure=None):
        """As torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("Adam in one pass knows neither amsgrad nor maximize")
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
        rates = (
            float(state["step"]),
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            self.decoupled,
            self.clip,
        )
        torch.ops.rwkv.adam(p, gradient.contiguous(), *moments, *rates)


def norm(gradients: list[Tensor]) -> Tensor:
    """Of all of them together, a scalar; 0 of none."""
    return torch.norm(torch.stack([torch.norm(g) for g in gradients])) if gradients else torch.tensor(0.0)
