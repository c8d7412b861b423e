"""torch's fused Adam for GPUs, on a CPU.

torch 2.13 has a fused CPU kernel. torch 1.13.1 has none, so its formula is used instead: tests
cover everything around the kernel, but not the kernel itself. test_optimizer.py checks the formula
against torch's kernels.
"""

import torch

from rwkv import compat
from rwkv.train.runtime import fused_adam


def use_on_cpu(monkeypatch) -> None:
    """Make runs on a CPU use the optimizer of GPUs."""
    monkeypatch.setattr(fused_adam, "on_gpus", lambda groups: True)
    if compat.stack() != "cu117":
        return
    monkeypatch.setattr(torch, "_fused_adam_", formula)
    begin = torch.optim.Adam.__init__

    def without_gpu_check(self, *arguments, fused=False, **keywords):
        begin(self, *arguments, **keywords)
        self.defaults["fused"] = fused
        for group in self.param_groups:
            group["fused"] = fused

    monkeypatch.setattr(torch.optim.Adam, "__init__", without_gpu_check)


def formula(
    params,
    grads,
    averages,
    squares,
    _,
    steps,
    *,
    lr,
    beta1,
    beta2,
    weight_decay,
    eps,
    amsgrad,
    maximize,
    grad_scale,
    found_inf,
):
    """torch._fused_adam_ of torch 1.13.1, without amsgrad and maximize."""
    assert not amsgrad
    assert not maximize
    update = torch.tensor(1.0) if found_inf is None else 1 - found_inf
    for p, g, m, v, step in zip(params, grads, averages, squares, steps, strict=True):
        g = g if grad_scale is None else g / grad_scale
        g = g + weight_decay * p
        mean, square = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
        size = lr / (1 - beta1**step)
        moved = p - size * mean / (square.sqrt() / (1 - beta2**step).sqrt() + eps)
        for old, new in ((m, mean), (v, square), (p, moved)):
            old.copy_(torch.where(update > 0, new, old))
