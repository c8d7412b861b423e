"""What DeepSpeed's ZeRO has shared out over the ranks, by the names of parameters: gathered whole on rank 0, and shared out again.

Stages 1 and 2 lay the parameters of a group end to end and give each rank one length of it, stage 3 cuts every parameter into as many pieces as there
are ranks. Either way a rank has one piece of a parameter, in a flat fp32 tensor that stands for it in the optimizer. One parameter at a time is put
together, also on the way back, so a rank needs room for the largest beside its share, and rank 0 main memory for all of them when they are saved.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rwkv import compat
from rwkv.train.runtime.strategy import shape


@dataclass(frozen=True)
class Piece:
    """This rank's part of a parameter: parameter[begin : begin + length], in a row, is flat[at : at + length]. Group: that of the optimizer."""

    flat: Tensor
    at: int
    begin: int
    length: int
    group: dict[str, Any]


def is_sharded(optimizer: Any) -> bool:
    """Whether an optimizer, as Lightning holds it, is ZeRO's."""
    return hasattr(optimizer, "single_partition_of_fp32_groups") or hasattr(optimizer, "fp32_partitioned_groups_flat")


def pieces(optimizer: Any) -> dict[nn.Parameter, Piece]:
    """Of every parameter that trains this rank's piece; of length 0 where it has none."""
    rank = dist.get_rank()
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        groups, found = optimizer.optimizer.param_groups, {}
        for i, (parameters, flat) in enumerate(
            zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        ):
            at = 0
            for parameter in parameters:
                share, group = parameter.ds_tensor.ds_numel, groups[optimizer.sub_group_to_group_id[i]]
                begin = min(rank * share, parameter.ds_numel)
                found[parameter] = Piece(flat, at, begin, min(share, parameter.ds_numel - begin), group)
                at += share
        return found
    found = {}
    parts = (
        optimizer.bit16_groups,
        optimizer.bit16_groups_flat,
        optimizer.single_partition_of_fp32_groups,
        optimizer.optimizer.param_groups,
    )
    for parameters, whole, flat, group in zip(*parts, strict=True):
        first = rank * flat.numel()
        for parameter in parameters:  # a view of its group's row
            offset = (parameter.data_ptr() - whole.data_ptr()) // parameter.element_size()
            begin = min(max(first - offset, 0), parameter.numel())
            end = min(max(first + flat.numel() - offset, begin), parameter.numel())
            found[parameter] = Piece(flat, offset + begin - first, begin, end - begin, group)
    return found


def weights(parameters: Mapping[str, nn.Parameter], optimizer: Any, device: torch.device) -> dict[str, Tensor]:
    """Parameters whole, by name, those that train in fp32. Called on every rank; all of them on rank 0, elsewhere those that no rank need wait for."""
    if not is_sharded(optimizer):
        return {name: parameter.detach() for name, parameter in parameters.items()}
    here, found = pieces(optimizer), {}
    for name, parameter in parameters.items():
        if parameter in here:
            value = _gather(here[parameter], here[parameter].flat, shape(parameter), device)
        else:
            value = _frozen(parameter)
        if value is not None:
            found[name] = value
    return found


def optimizer_state(
    parameters: Mapping[str, nn.Parameter], optimizer: Any, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Adam's `step`, `exp_avg` and `exp_avg_sq` of every parameter that trains, by name. Called on every rank; all of it on rank 0."""
    if not is_sharded(optimizer):
        state = optimizer.state
        return {name: dict(state[parameter]) for name, parameter in parameters.items() if parameter in state}
    here, state, found = pieces(optimizer), optimizer.optimizer.state, {}
    for name, parameter in parameters.items():
        piece = here[parameter]
        if not (known := state.get(piece.flat)):  # no step has been made
            continue
        moments = {key: _gather(piece, known[key], shape(parameter), device) for key in ("exp_avg", "exp_avg_sq")}
        if dist.get_rank() == 0:
            step = (
                known["step"] if "step" in known else piece.group["step"]
            )  # DeepSpeed's FusedAdam counts for the group
            # A tensor each: those that share one would each count it on.
            found[name] = {"step": torch.tensor(float(step)), **moments}
    return found


def scaler(optimizer: Any) -> dict[str, Any]:
    """What ZeRO's own loss scaling has come to, in fp16; else empty."""
    if not getattr(optimizer, "dynamic_loss_scale", False):
        return {}
    return {key: value for key, value in vars(optimizer.loss_scaler).items() if isinstance(value, int | float)}


Take = Callable[[str], dict[str, Any]]
"""Called on every rank, in the same order: the `weight` of this name, whole, and its optimizer state, if it has one."""


@torch.no_grad()
def put_back(parameters: Mapping[str, nn.Parameter], optimizer: Any, take: Take, scale: Mapping[str, Any]) -> None:
    """Put back what `weights`, `optimizer_state` and `scaler` gathered, also of another strategy, one parameter at a time. Called on every rank."""
    if not is_sharded(optimizer):
        states, groups = {}, optimizer.state_dict()["param_groups"]
        fused = {name for group in groups if group.get("fused") for name in group["names"]}
        for name, parameter in parameters.items():
            state = take(name)
            parameter.copy_(state.pop("weight"))
            if state:  # copied: it may lie in a file
                states[name] = {key: x.clone() if isinstance(x, Tensor) else x for key, x in state.items()}
                if isinstance(step := states[name].get("step"), Tensor):  # torch 1.13.1 leaves it where it was
                    states[name]["step"] = (
                        compat.like_step(step.to(parameter.device)) if name in fused else step.to("cpu").reshape(())
                    )
        names = [name for group in optimizer.param_groups for name in group["names"]]
        optimizer.load_state_dict(
            {"state": {i: states[name] for i, name in enumerate(names) if name in states}, "param_groups": groups}
        )
        return
    if scale and scale.keys() == scaler(optimizer).keys():  # of another strategy's it begins anew
        vars(optimizer.loss_scaler).update(scale)
    here = pieces(optimizer)
    for name, parameter in parameters.items():
        state, piece = take(name), here[parameter]
        value = state.pop("weight")
        _scatter(piece, piece.flat, value)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor[: piece.length].copy_(value.flatten()[piece.begin : piece.begin + piece.length])
        else:
            parameter.copy_(value)
        if state:
            _put_state_back(piece, optimizer.optimizer, state)


def _put_state_back(piece: Piece, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    known = optimizer.state[piece.flat]
    for key in ("exp_avg", "exp_avg_sq"):
        _scatter(piece, known.setdefault(key, torch.zeros_like(piece.flat)), state[key])
    step = float(state["step"])
    if type(optimizer).__module__.startswith("torch."):
        known["step"] = (
            compat.like_step(torch.tensor(step, device=piece.flat.device))
            if piece.group.get("fused")
            else torch.tensor(step)
        )
    else:
        known["step"] = piece.group["step"] = int(step)


def _gather(piece: Piece, source: Tensor, size: torch.Size, device: torch.device) -> Tensor | None:
    whole = torch.zeros(size.numel(), dtype=torch.float32, device=device)
    whole[piece.begin : piece.begin + piece.length] = source[piece.at : piece.at + piece.length].to(device)
    dist.reduce(whole, 0)  # the others' pieces are 0 here
    return whole.view(size).cpu() if dist.get_rank() == 0 else None


def _scatter(piece: Piece, target: Tensor, whole: Tensor) -> None:
    target[piece.at : piece.at + piece.length].copy_(whole.flatten()[piece.begin : piece.begin + piece.length])


def _frozen(parameter: nn.Parameter) -> Tensor | None:
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().cpu().clone() if dist.get_rank() == 0 else None
