"""torch's fused Adam, which GPUs have, on a CPU."""

import torch

from rwkv import compat


def on_a_cpu(monkeypatch) -> None:
    """Runs on a CPU take the optimizer that runs on a GPU take. torch 2.13's kernel is on CPUs too; in the place of 1.13.1's stands its formula."""
    monkeypatch.setattr(compat, "on_gpus", lambda groups: True)
    if compat.stack() != "cu117":
        return
    monkeypatch.setattr(torch, "_fused_adam_", _fused_adam)
    begin = torch.optim.Adam.__init__

    def without_asking_for_a_gpu(self, *arguments, fused=False, **keywords):
        begin(self, *arguments, **keywords)
        self.defaults["fused"] = fused
        for group in self.param_groups:
            group["fused"] = fused

    monkeypatch.setattr(torch.optim.Adam, "__init__", without_asking_for_a_gpu)


def _fused_adam(
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
    assert not amsgrad
    assert not maximize
    go = torch.tensor(1.0) if found_inf is None else 1 - found_inf
    for p, g, m, v, step in zip(params, grads, averages, squares, steps, strict=True):
        g = g if grad_scale is None else g / grad_scale
        g = g + weight_decay * p
        mean, square = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
        size = lr / (1 - beta1**step)
        moved = p - size * mean / (square.sqrt() / (1 - beta2**step).sqrt() + eps)
        for old, new in ((m, mean), (v, square), (p, moved)):
            old.copy_(torch.where(go > 0, new, old))
