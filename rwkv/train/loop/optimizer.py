"""Parameter groups with layerwise learning rates, and Adam."""

import torch
from torch import nn

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.models import RWKV
from rwkv.train.loop import adam
from rwkv.train.runtime import strategy


def groups(model: RWKV, c: TrainConfig) -> list[dict]:
    """Parameter groups with `lr_scale` and `decays`, by the rules of the model's version (lr_scale, decays). A parameter with a
    scale other than 1 does not decay. Frozen parameters are in none.
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
    """Adam over the trainable parameters, AdamW where weight_decay > 0; the schedule sets rates and decays before every step. Or Adafactor
    (Shazeer & Stern 2018, arXiv:1804.04235) by transformers.

    Adam is torch's, fused on a GPU, on a CPU in one pass by the compiled unit; under DeepSpeed its own where it is compiled.
    """
    if c.optimizer == "adafactor":
        return _adafactor(groups(model, c), c.lr_init)
    options = {"lr": c.lr_init, "betas": (c.beta1, c.beta2), "eps": c.adam_eps}
    zero = strategy.zero(c)
    if zero and (kind := compat.deepspeed_adam(zero.offload_optimizer)):
        return kind(groups(model, c), **options)  # without a decay AdamW is Adam
    if not zero and adam.takes(found := groups(model, c)):
        return adam.OnePass(found, c.weight_decay > 0, **options)
    fused = not (zero and zero.offload_optimizer)
    return compat.adam(groups(model, c), c.weight_decay > 0, fused, deepspeed=bool(zero), **options)


def _adafactor(groups: list[dict], rate: float) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor  # seconds to import: only where it is asked for

    class WithClosure(Adafactor):
        @torch.no_grad()
        def step(
            self, closure=None
        ):  # transformers' calls it without gradients, and Lightning's closure is the backward pass
            with torch.enable_grad():
                loss = None if closure is None else closure()
            super().step()
            return loss

    # The schedule's rates as they are: neither relative to the step's number nor to the size of the weights.
    return WithClosure(groups, lr=rate, relative_step=False, scale_parameter=False, warmup_init=False)


def leave_out_unless_finite(made: torch.optim.Optimizer, parameters: list[nn.Parameter], norm: torch.Tensor) -> None:
    """Let the coming step of an optimizer be none, weights and its state as they are, if the norm of the gradient of `parameters` is no finite number.

    Adam on a GPU decides there; for others the host asks, which waits for the device.
    """
    if hasattr(made, "found_inf"):
        made.found_inf = compat.like_step((~torch.isfinite(norm)).float())
    elif not torch.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None  # what has none is passed over


def set_rates(optimizer: torch.optim.Optimizer, rate: float, decay: float) -> None:
    """Set every group's learning rate and weight decay for the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
        if group["decays"]:
            group["weight_decay"] = decay
