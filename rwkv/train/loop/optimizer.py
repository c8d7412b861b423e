"""Parameter groups with layerwise learning rates, and the optimizer."""

from typing import Any

import torch
from torch import nn

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.kernels import bf16_copy
from rwkv.models import RWKV
from rwkv.train.loop import adam
from rwkv.train.loop.adamw8bit import AdamW8bit
from rwkv.train.loop.closure import evaluate
from rwkv.train.loop.muon import Muon
from rwkv.train.runtime import fused_adam, strategy


def groups(model: RWKV, c: TrainConfig) -> list[dict]:
    """Parameter groups of the trainable parameters, with keys `lr_scale` and `decays` from the
    model's version. Only parameters with lr_scale 1 have weight decay.
    """
    found: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = model.version.lr_scale(name, c.my_pile_stage == 2) if c.layerwise_lr else 1.0
        decays = c.weight_decay > 0 and scale == 1.0 and model.version.decays(name, strategy.shape(parameter))
        found.setdefault((scale, decays), []).append((name, parameter))
    return [
        {
            "params": [p for _, p in named],
            "names": [name for name, _ in named],
            "lr_scale": scale,
            "weight_decay": 0.0,
            "decays": decays,
        }
        for (scale, decays), named in sorted(found.items())
    ]


def make(model: RWKV, c: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer of the trainable parameters: Adam, AdamW if weight_decay > 0; Adafactor
    (Shazeer & Stern 2018, arXiv:1804.04235) from transformers; AdamW8bit; or Muon. `set_rates` must
    be called before every step.

    Adam is torch's fused one on a GPU and `adam.FusedAdam` on a CPU; with DeepSpeed its own, if
    compiled. A step also writes the copies of --bf16_copies.
    """
    if c.optimizer == "adafactor":
        return _adafactor(groups(model, c), c.lr_init)
    options = {"lr": c.lr_init, "betas": (c.beta1, c.beta2), "eps": c.adam_eps}
    if c.optimizer == "adamw8bit":
        return AdamW8bit(groups(model, c), c.random_seed, bool(c.release_grads), **options)
    if c.optimizer == "muon":
        return Muon(groups(model, c), torch.bfloat16 if c.precision == "bf16" else torch.float32, **options)
    zero = strategy.zero(c)
    if zero and (kind := compat.deepspeed_adam(zero.offload_optimizer)):
        return kind(groups(model, c), **options)  # AdamW is Adam without weight decay
    if not zero and adam.supports(found := groups(model, c)):
        return adam.FusedAdam(found, c.weight_decay > 0, **options)
    fused = not (zero and zero.offload_optimizer)
    made = fused_adam.adam(groups(model, c), c.weight_decay > 0, fused, deepspeed=bool(zero), **options)
    return _writing_copies(made) if c.bf16_copies else made


def _writing_copies(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let every step also write the bf16 copies of the weights. (torch 1.13.1 has no hooks of
    optimizers, and with an optimizer_step of the module Lightning 1.9 warns.)
    """
    step: Any = optimizer.step

    def step_and_copy(*arguments: Any, **keywords: Any) -> Any:
        result = step(*arguments, **keywords)
        bf16_copy.refresh(p for group in optimizer.param_groups for p in group["params"])
        return result

    optimizer.step = step_and_copy  # type: ignore[method-assign]
    return optimizer


def _adafactor(groups: list[dict], rate: float) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor  # takes seconds to import, so imported on use

    class WithClosure(Adafactor):
        # transformers would call the closure with gradients disabled
        @torch.no_grad()
        def step(self, closure=None):
            loss = evaluate(closure)
            super().step()
            return loss

    # use the schedule's learning rate unchanged
    return WithClosure(groups, lr=rate, relative_step=False, scale_parameter=False, warmup_init=False)


def skip_step_unless_finite(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], norm: torch.Tensor
) -> None:
    """Make the optimizer's next step leave weights and state unchanged if the gradient norm of
    `parameters` is NaN or Inf.

    Fused Adam checks it on the GPU; other optimizers need a synchronisation.
    """
    if hasattr(optimizer, "found_inf"):
        optimizer.found_inf = fused_adam.like_step((~torch.isfinite(norm)).float())
    elif not torch.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None  # optimizers skip parameters without gradient


def set_rates(optimizer: torch.optim.Optimizer, rate: float, decay: float) -> None:
    """Set every group's learning rate and weight decay for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        if group["decays"]:
            group["weight_decay"] = decay
