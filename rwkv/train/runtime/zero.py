"""Gather parameters and optimizer state sharded by DeepSpeed's ZeRO on rank 0, by parameter name;
and scatter them again.

Stages 1 and 2 concatenate the parameters of a group and give each rank an equal slice, stage 3
splits every parameter over the ranks. In all stages a rank has one contiguous shard of each
parameter (possibly empty) in a flat fp32 tensor, which is what the optimizer updates. Parameters
are gathered and scattered one at a time, so every rank needs memory for the largest one, and rank 0
host memory for all of them when saving.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rwkv.train.runtime import fused_adam
from rwkv.train.runtime.strategy import shape


@dataclass(frozen=True)
class Shard:
    """This rank's shard of a parameter: parameter.flatten()[begin : begin + length] is flat[offset
    : offset + length].

    Attributes:
        group: the optimizer's parameter group.
    """

    flat: Tensor
    offset: int
    begin: int
    length: int
    group: dict[str, Any]


def is_sharded(optimizer: Any) -> bool:
    """Whether one of the trainer's optimizers is a ZeRO optimizer."""
    return hasattr(optimizer, "single_partition_of_fp32_groups") or hasattr(optimizer, "fp32_partitioned_groups_flat")


def shards(optimizer: Any) -> dict[nn.Parameter, Shard]:
    """This rank's shard of every trained parameter; may have length 0."""
    rank = dist.get_rank()
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        groups, found = optimizer.optimizer.param_groups, {}
        for i, (parameters, flat) in enumerate(
            zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        ):
            offset = 0
            for parameter in parameters:
                size, group = parameter.ds_tensor.ds_numel, groups[optimizer.sub_group_to_group_id[i]]
                begin = min(rank * size, parameter.ds_numel)
                found[parameter] = Shard(flat, offset, begin, min(size, parameter.ds_numel - begin), group)
                offset += size
        return found
    found = {}
    parts = (
        optimizer.bit16_groups,
        optimizer.bit16_groups_flat,
        optimizer.single_partition_of_fp32_groups,
        optimizer.optimizer.param_groups,
    )
    for parameters, concatenated, flat, group in zip(*parts, strict=True):
        first = rank * flat.numel()
        for parameter in parameters:  # a view of the concatenated group
            start = (parameter.data_ptr() - concatenated.data_ptr()) // parameter.element_size()
            begin = min(max(first - start, 0), parameter.numel())
            end = min(max(first + flat.numel() - start, begin), parameter.numel())
            found[parameter] = Shard(flat, start + begin - first, begin, end - begin, group)
    return found


def weights(parameters: Mapping[str, nn.Parameter], optimizer: Any, device: torch.device) -> dict[str, Tensor]:
    """Full parameters by name; sharded ones in fp32. Called on every rank; the result is complete
    on rank 0, elsewhere only parameters that are not sharded.
    """
    if not is_sharded(optimizer):
        return {name: parameter.detach() for name, parameter in parameters.items()}
    local, found = shards(optimizer), {}
    for name, parameter in parameters.items():
        if parameter in local:
            value = _gather(local[parameter], local[parameter].flat, shape(parameter), device)
        else:
            value = _frozen(parameter)
        if value is not None:
            found[name] = value
    return found


def optimizer_state(
    parameters: Mapping[str, nn.Parameter], optimizer: Any, device: torch.device
) -> dict[str, dict[str, Any]]:
    """The optimizer state (for Adam `step`, `exp_avg`, `exp_avg_sq`) of every trained parameter, by
    name. Called on every rank; complete on rank 0.
    """
    if not is_sharded(optimizer):
        state = optimizer.state
        return {name: dict(state[parameter]) for name, parameter in parameters.items() if parameter in state}
    local, state, found = shards(optimizer), optimizer.optimizer.state, {}
    for name, parameter in parameters.items():
        shard = local[parameter]
        if not (known := state.get(shard.flat)):  # before the first step
            continue
        moments = {key: _gather(shard, known[key], shape(parameter), device) for key in ("exp_avg", "exp_avg_sq")}
        if dist.get_rank() == 0:
            # DeepSpeed's FusedAdam has one step count per group
            step = known["step"] if "step" in known else shard.group["step"]
            # separate tensors: a shared one would be incremented once per parameter
            found[name] = {"step": torch.tensor(float(step)), **moments}
    return found


def scaler(optimizer: Any) -> dict[str, Any]:
    """The state of ZeRO's loss scaler in fp16; else empty."""
    if not getattr(optimizer, "dynamic_loss_scale", False):
        return {}
    return {key: value for key, value in vars(optimizer.loss_scaler).items() if isinstance(value, int | float)}


Fetch = Callable[[str], dict[str, Any]]
"""Returns the full `weight` of a name, and its optimizer state if there is one. Called on every
rank in the same order.
"""


@torch.no_grad()
def restore(parameters: Mapping[str, nn.Parameter], optimizer: Any, fetch: Fetch, scale: Mapping[str, Any]) -> None:
    """Restore weights, optimizer state and loss scale from those gathered by `weights`,
    `optimizer_state` and `scaler`, possibly with another strategy. Called on every rank.
    """
    if not is_sharded(optimizer):
        states, groups = {}, optimizer.state_dict()["param_groups"]
        fused = {name for group in groups if group.get("fused") for name in group["names"]}
        for name, parameter in parameters.items():
            state = fetch(name)
            parameter.copy_(state.pop("weight"))
            if state:  # cloned, as it may be memory-mapped
                states[name] = {key: x.clone() if isinstance(x, Tensor) else x for key, x in state.items()}
                if isinstance(step := states[name].get("step"), Tensor):  # torch 1.13.1 does not move it
                    states[name]["step"] = (
                        fused_adam.like_step(step.to(parameter.device)) if name in fused else step.to("cpu").reshape(())
                    )
        names = [name for group in optimizer.param_groups for name in group["names"]]
        optimizer.load_state_dict(
            {"state": {i: states[name] for i, name in enumerate(names) if name in states}, "param_groups": groups}
        )
        return
    # the loss scale of another strategy is not used
    if scale and scale.keys() == scaler(optimizer).keys():
        vars(optimizer.loss_scaler).update(scale)
    local = shards(optimizer)
    for name, parameter in parameters.items():
        state, shard = fetch(name), local[parameter]
        value = state.pop("weight")
        _scatter(shard, shard.flat, value)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor[: shard.length].copy_(value.flatten()[shard.begin : shard.begin + shard.length])
        else:
            parameter.copy_(value)
        if state:
            _restore_moments(shard, optimizer.optimizer, state)


def _restore_moments(shard: Shard, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    known = optimizer.state[shard.flat]
    for key in ("exp_avg", "exp_avg_sq"):
        _scatter(shard, known.setdefault(key, torch.zeros_like(shard.flat)), state[key])
    step = float(state["step"])
    if type(optimizer).__module__.startswith("torch."):
        known["step"] = (
            fused_adam.like_step(torch.tensor(step, device=shard.flat.device))
            if shard.group.get("fused")
            else torch.tensor(step)
        )
    else:
        known["step"] = shard.group["step"] = int(step)


def _gather(shard: Shard, source: Tensor, size: torch.Size, device: torch.device) -> Tensor | None:
    full = torch.zeros(size.numel(), dtype=torch.float32, device=device)
    full[shard.begin : shard.begin + shard.length] = source[shard.offset : shard.offset + shard.length].to(device)
    dist.reduce(full, 0)  # sum: the shards of other ranks are 0 here
    return full.view(size).cpu() if dist.get_rank() == 0 else None


def _scatter(shard: Shard, target: Tensor, full: Tensor) -> None:
    target[shard.offset : shard.offset + shard.length].copy_(full.flatten()[shard.begin : shard.begin + shard.length])


def _frozen(parameter: nn.Parameter) -> Tensor | None:
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().cpu().clone() if dist.get_rank() == 0 else None
