"""The optimizer of --optimizer adamw8bit: AdamW for bf16 weights without fp32 masters.

About 6 bytes per parameter (weight 2, gradient 2, moments 2) instead of Adam's 16, or 4 if each
gradient is freed in the backward pass. Arithmetic, rounding and state: rwkv.kernels.adamw.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rwkv import compat
from rwkv.kernels import adamw
from rwkv.train.loop.closure import evaluate


class AdamW8bit(torch.optim.Optimizer):
    """AdamW on fp32 and bf16 parameters; groups have keys `params` and `names`.

    Args:
        seed: of the random bits that round bf16 weights. They depend on it, the number of steps,
            the parameter's name and the element's index only, so all ranks round alike and a
            resumed run continues with the same bits.
        release: update each parameter in the backward pass, as soon as its gradient is complete,
            and free the gradient. `step` then only calls the closure.
    """

    def __init__(self, groups: list[dict[str, Any]], seed: int, release: bool = False, **options: Any):
        super().__init__(groups, {"weight_decay": 0.0, **options})
        self.seed, self.release = seed, release
        self._clip: Tensor | None = None  # of the next step; None: 1
        self._unclipped: dict[torch.device, Tensor] = {}  # the factor 1
        self._hooks = [
            # by index: load_state_dict replaces the groups
            compat.on_gradient(p, lambda p, i=i, name=name: self._update(p, name, self.param_groups[i]))
            for i, group in enumerate(self.param_groups)
            for p, name in zip(group["params"], group["names"], strict=True)
            if release
        ]

    def set_clip(self, limit: float) -> Tensor | None:
        """Clip the gradients of the next step, within the step, to a norm of `limit`. If their norm
        is NaN or Inf, the step changes no weight or moment. Does not synchronise with the host.

        Returns:
            The norm, a scalar; None if gradients are released.
        """
        if self.release:
            return None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)
        factor = torch.clamp(limit / (norm + 1e-6), max=1)
        self._clip = torch.where(torch.isfinite(norm), factor, factor * float("nan")).view(1)
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As torch.optim.Optimizer.step."""
        loss = evaluate(closure)
        for group in self.param_groups:
            for p, name in zip(group["params"], group["names"], strict=True):
                self._update(p, name, group)
        self._clip = None
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's, which would convert the moments to the parameter's dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            p = parameters[i]
            self.state[p] = {key: x.to(p.device) if isinstance(x, Tensor) else x for key, x in state.items()}

    def _update(self, p: nn.Parameter, name: str, group: dict[str, Any]) -> None:
        if (gradient := p.grad) is None:
            return
        state = self.state[p]
        if not state:
            state.update(adamw.new_state(p))
        if p.device not in self._unclipped:
            self._unclipped[p.device] = torch.ones(1, device=p.device)
        clip = self._unclipped[p.device] if self._clip is None else self._clip
        key = adamw.rounding_key(self.seed, state["step"] + 1, name)
        options = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        adamw.step(p.data, gradient, state, clip, key, *options)
        if self.release:
            p.grad = None
