"""--auto: choose flags that fit into memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.memory import estimate, machine, search
from rwkv.memory.plan import Plan
from rwkv.memory.zero import ZEROS

QUANTISED = ("int8", "nf4")  # by --auto, the more accurate first
USABLE = 0.92  # fraction of memory to plan for; the rest covers fragmentation and prediction errors


def available(plan: Plan) -> int:
    """Bytes that a run can use on each device of this machine; 0 if unknown."""
    found = machine.memory_of(plan.gpu, plan.per_node)
    return round(USABLE * (found if plan.gpu else found / max(1, plan.per_node)))


def choose(
    c: TrainConfig, plan: Plan, usable: Callable[[TrainConfig], bool], quantise: bool = False
) -> tuple[TrainConfig, str]:
    """Choose the flags of --auto; returns them and a description. The effective batch size does not
    change: with a smaller micro_bsz more batches are accumulated.

    Each of `_methods` is tried from fast to slow: without gradient checkpointing, then with it,
    each from the largest micro_bsz to the smallest. If the memory size is unknown, the flags do not
    change.

    Args:
        usable: whether flags are compatible with each other and with this machine.
        quantise: whether the frozen matrices may be quantised.

    Raises:
        UserError: nothing fits; the message suggests a change that does, if there is one.
    """
    limit = available(plan)
    if not limit:
        return c, "the memory size of this device is unknown; flags unchanged"
    host = USABLE * machine.memory_of(gpu=False)
    host_note, last = "", plan
    for candidate in search.candidates(plan, _methods(c, plan, quantise)):
        chosen = _with_plan(c, plan, candidate)
        if not usable(chosen):
            continue
        last, found = candidate, estimate.estimate(candidate)
        flags = (
            f"--micro_bsz {candidate.micro_bsz} --accumulate_grad_batches {candidate.accumulate}"
            f" --grad_cp {int(candidate.grad_cp)} --strategy {candidate.strategy}"
        )
        if found.total > limit:
            continue
        if candidate.offload and found.host_total > host:
            host_note = host_note or (
                f"{flags} would fit, but needs {found.host_total / 1e9:.1f} GB of host memory; {host / 1e9:.1f} GB are usable. "
            )
            continue
        return chosen, f"{flags}{_why(plan, candidate)}: {found.total / 1e9:.2f} of {limit / 1e9:.2f} GB"
    rest = "Use LoRA (scripts/lora.py), a shorter --ctx_len, or a smaller model" if host_note else advice(last, limit)
    raise UserError(f"--auto: nothing fits into {limit / 1e9:.2f} GB. {host_note}{rest}")


def _methods(c: TrainConfig, plan: Plan, quantise: bool) -> list[dict[str, Any]]:
    """Changed fields of a plan, in the order in which --auto tries them (docs/decisions/033): those
    of the flags; DeepSpeed on several GPUs, without offload; if `quantise` int8 and nf4; AdamW in 8
    bits if --optimizer is not given, of all weights in bf16 runs only; DeepSpeed with offload.
    """
    zero: list[dict[str, Any]] = []
    if c.strategy == "auto" and plan.gpu and plan.optimizer == "adam":
        zero = [{"strategy": name} for name in search.deepspeed_candidates(c.world_size)]
    narrow: list[dict[str, Any]] = [{"base": base} for base in QUANTISED if quantise]
    if c.optimizer == "auto" and c.adapter:
        narrow += [{**(narrow[-1] if narrow else {}), "optimizer": "adamw8bit"}]
    elif c.optimizer == "auto" and c.precision == "bf16":
        narrow = [{"optimizer": "adamw8bit"}]
        narrow += [{"optimizer": "adamw8bit", "release_grads": True}] if c.cuda_graph != "on" else []
    sharded = [] if c.adapter else [method for method in zero if not ZEROS[method["strategy"]].offload_optimizer]
    return [{}, *sharded, *narrow, *(method for method in zero if method not in sharded)]


def _with_plan(c: TrainConfig, plan: Plan, chosen: Plan) -> TrainConfig:
    """The flags of `chosen`, a candidate for `plan`."""
    base: dict[str, Any] = {} if chosen.base == plan.base else {"lora_base": chosen.base}
    return replace(
        c,
        **base,
        optimizer=cast(Any, chosen.optimizer),
        release_grads=1 if chosen.release_grads else 0,
        micro_bsz=chosen.micro_bsz,
        accumulate_grad_batches=chosen.accumulate,
        epoch_steps=c.epoch_steps * (c.micro_bsz // chosen.micro_bsz),
        grad_cp=1 if chosen.grad_cp else 0,
        strategy=chosen.strategy,
    )


def _why(plan: Plan, chosen: Plan) -> str:
    """The flags of a candidate that change what is computed, and why, for the log; "" if none."""
    base = f" --lora_base {chosen.base}" if chosen.base != plan.base else ""
    if chosen.optimizer == plan.optimizer:
        return base and f"{base} (without quantisation even --micro_bsz 1 --grad_cp 1 does not fit)"
    released = " --release_grads 1" if chosen.release_grads else ""
    return (
        f"{base} --optimizer {chosen.optimizer}{released} (with Adam in fp32 even --micro_bsz 1 --grad_cp 1 does not fit;"
        " --optimizer adam excludes it)"
    )


def advice(plan: Plan, limit: int) -> str:
    """The cheapest change that would fit, as a sentence."""
    found = search.cheapest_change(plan, limit)
    if found is None:
        return "No known change of flags fits; use a smaller model, or a device with more memory"
    return f"The cheapest change that fits: {found[0]} ({estimate.estimate(found[1]).total / 1e9:.2f} GB predicted)"
