"""torch's fused Adam and its GradScaler without a synchronisation with the host, on both stacks."""

import inspect
from typing import Any

import torch

from rwkv import compat


def adam(
    groups: list[dict[str, Any]], decoupled: bool, fused: bool, deepspeed: bool, **options: Any
) -> torch.optim.Optimizer:
    """torch's Adam, or AdamW if decoupled; fused if `fused` is set and all parameters are on GPUs.

    The fused optimizer has two attributes, each None or an fp32 tensor with one element, which
    apply to all steps until changed, without a synchronisation with the host: if found_inf is 1, a
    step changes neither the weights nor the optimizer state; gradients are divided by grad_scale.
    DeepSpeed checks the optimizer's class and gets torch's own, where grad_scale has no effect on
    torch 1.13.1; as that has no fused AdamW, AdamW uses foreach there.
    """
    # torch 1.13.1's stubs have neither foreach nor fused
    kind: Any = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer: Any
    if not (fused and on_gpus(groups)):
        return kind(groups, **options)
    if compat.stack() == "cu117" and not deepspeed:
        optimizer = _FusedAdam(groups, decoupled, fused=True, **options)
    elif "fused" not in inspect.signature(kind).parameters:
        return kind(groups, foreach=True, **options)
    else:
        optimizer = kind(groups, fused=True, **options)
    optimizer.found_inf = optimizer.grad_scale = None
    # Lightning rejects gradient clipping with optimizers that unscale fp16 gradients themselves;
    # here they are unscaled before the step.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def on_gpus(groups: list[dict[str, Any]]) -> bool:
    """Whether all parameters of an optimizer's groups are on GPUs."""
    return all(parameter.is_cuda for group in groups for parameter in group["params"])


def like_step(number: torch.Tensor) -> torch.Tensor:
    """Reshape a tensor with one element to the shape of fused Adam's `step`.

    The fused kernel subtracts found_inf from the steps; torch 1.13.1 launches one kernel per
    parameter if the shapes differ.
    """
    return number.reshape(1 if compat.stack() == "cu117" else ())


def set_clip(optimizer: Any, limit: float) -> torch.Tensor:
    """Clip the gradients of the next step to a norm of `limit`, as torch.nn.utils.clip_grad_norm_,
    but within the step, whose kernel reads every gradient anyway.

    The step divides gradients by max(1, (norm + 1e-6) / limit); clip_grad_norm_ multiplies them by
    the reciprocal, which may differ in the last bit. If the norm is NaN, so are all gradients.

    Args:
        optimizer: a fused one of `adam`, not that of DeepSpeed.
        limit: the greatest norm; Inf: no clipping.

    Returns:
        The norm of all gradients before clipping, a scalar.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    newer: Any = torch.nn.utils  # the stubs are those of 1.13.1
    norm = total_norm(gradients) if compat.stack() == "cu117" else newer.get_total_norm(gradients)
    optimizer.grad_scale = like_step(torch.clamp((norm.float() + 1e-6) / limit, min=1))
    return norm


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all gradients, a scalar; 0 for an empty list. That of clip_grad_norm_ in torch
    1.13.1, which launches a kernel per gradient on GPUs.
    """
    return torch.norm(torch.stack(torch._foreach_norm(gradients))) if gradients else torch.tensor(0.0)


class _FusedAdam(torch.optim.Adam):
    """torch 1.13.1's fused Adam, extended by decoupled weight decay and by found_inf and grad_scale
    without a GradScaler.
    """

    found_inf: Any = None  # or a tensor with one element
    grad_scale: Any = None

    def __init__(self, groups: list[dict[str, Any]], decoupled: bool, **options: Any):
        super().__init__(groups, **options)
        self.decoupled = decoupled

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()  # may set found_inf and grad_scale
        decays = [group["weight_decay"] for group in self.param_groups]
        if self.decoupled:
            for group in self.param_groups:
                self._decay(group)
        try:
            scaler = None if self.found_inf is None and self.grad_scale is None else self
            super().step(grad_scaler=scaler)  # type: ignore[call-arg]  # not in its stubs
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        return loss

    def _decay(self, group: dict[str, Any]) -> None:
        factor = group["lr"] * group["weight_decay"]
        group["weight_decay"] = 0.0  # applied here, not through the gradient
        for parameter in group["params"]:
            if factor and parameter.grad is not None:
                parameter.mul_(1 - factor if self.found_inf is None else 1 - factor * (1 - self.found_inf))

    # The part of GradScaler's interface that Adam uses; it needs both tensors.
    def _get_scale_async(self) -> torch.Tensor:
        return torch.ones_like(self.found_inf) if self.grad_scale is None else self.grad_scale

    def _check_inf_per_device(self, _: Any) -> dict[torch.device, torch.Tensor]:
        found = torch.zeros_like(self.grad_scale) if self.found_inf is None else self.found_inf
        return {found.device: found}


def grad_scaler() -> Any:
    """torch's GradScaler class, without a synchronisation with the host in every step.

    An optimizer with found_inf (see `adam`) skips steps with overflowed fp16 gradients itself;
    torch's GradScaler reads the overflow flag on the host before every step.
    """
    newer: Any = torch  # the stubs are those of 1.13.1
    base: Any = torch.cuda.amp.GradScaler if compat.stack() == "cu117" else newer.amp.GradScaler

    class GradScaler(base):
        def _maybe_opt_step(self, optimizer: Any, state: Any, *arguments: Any, **keywords: Any) -> Any:
            if not hasattr(optimizer, "found_inf"):
                return super()._maybe_opt_step(optimizer, state, *arguments, **keywords)
            previous, found = optimizer.found_inf, like_step(sum(state["found_inf_per_device"].values()))
            optimizer.found_inf = found if previous is None else torch.maximum(previous, found)
            try:
                return optimizer.step(*arguments, **keywords)
            finally:
                optimizer.found_inf = previous

    return GradScaler
