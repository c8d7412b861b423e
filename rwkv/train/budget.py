"""A run's flags as a plan of its memory, and --auto: the flags that fit."""

from dataclasses import replace
from typing import Any

from rwkv import compat
from rwkv.adapters import lora
from rwkv.config import EstimateConfig, LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.memory import estimate, machine, search
from rwkv.models import Sizes

ROOM = 0.92  # of the memory: what the allocator cannot use, and the prediction's error


def plan_of(c: TrainConfig | EstimateConfig, sizes: Sizes, gpu: bool, precision: str) -> estimate.Plan:
    """The flags of a run, or of an estimate, as memory.estimate takes them. Pieces in time (tbptt_len) are as long as a context that is held at once."""
    adapter: dict[str, Any] = {"lora": False}
    if isinstance(c, LoRAConfig | EstimateConfig):
        adapts = c.lora if isinstance(c, LoRAConfig) else c.method == "lora"
        adapter = {"lora": adapts, "r": c.lora_r, "parts": lora.parts_in(c.lora_parts), "base": c.lora_base}
    return estimate.Plan(
        sizes,
        **adapter,
        ctx_len=min(c.ctx_len, getattr(c, "tbptt_len", 0) or c.ctx_len),
        micro_bsz=c.micro_bsz,
        precision=precision,
        grad_cp=bool(c.grad_cp),
        optimizer=c.optimizer,
        strategy=c.strategy,
        devices=c.devices * c.num_nodes,
        per_node=c.devices,
        accumulate=c.accumulate_grad_batches,
        ds_bucket_mb=c.ds_bucket_mb,
        gpu=gpu,
        process=compat.process_bytes(),
    )


def room(plan: estimate.Plan) -> int:
    """Bytes that each device of this machine has for a run; 0 if nobody knows."""
    found = machine.memory_of(plan.gpu, plan.per_node)
    return round(ROOM * (found if plan.gpu else found / max(1, plan.per_node)))


def choose(c: TrainConfig, plan: estimate.Plan) -> tuple[TrainConfig, str]:
    """Flags whose run fits, and what was chosen, in words. The step stays the same: a smaller micro_bsz is accumulated as often as it takes.

    Not recomputing comes before recomputing (a third more time), a large micro_bsz before a small one, and DeepSpeed's sharing out and
    offload, where the run is on GPUs and does not fit without, last; offload where the host has room for it.

    Where the memory is unknown the flags stay as they are.

    Raises:
        UserError: nothing fits; what would, if anything.
    """
    limit = room(plan)
    if not limit:
        return c, "the memory of this device is unknown; flags stay as given"
    begin = replace(plan, grad_cp=False)
    micros = [m for m in range(c.micro_bsz, 0, -1) if c.micro_bsz % m == 0]
    strategies = [c.strategy]
    if c.strategy == "auto" and plan.gpu and c.optimizer == "adam":
        strategies += [name for name in search.offered(c.devices * c.num_nodes) if _can(replace(c, strategy=name))]
    short = ""
    for name in strategies:
        for grad_cp in (False, True):
            for m in micros:
                k = c.micro_bsz // m
                plan = replace(
                    begin, strategy=name, grad_cp=grad_cp, micro_bsz=m, accumulate=c.accumulate_grad_batches * k
                )
                found = estimate.estimate(plan)
                words = f"--micro_bsz {m} --accumulate_grad_batches {plan.accumulate} --grad_cp {int(grad_cp)} --strategy {name}"
                if (
                    found.total <= limit
                    and plan.offload
                    and found.host_total > (host := ROOM * machine.memory_of(gpu=False))
                ):
                    short = (
                        short
                        or f"{words} would fit there, but takes {found.host_total / 1e9:.1f} GB of the host, which has {host / 1e9:.1f}. "
                    )
                elif found.total <= limit:
                    chosen = replace(
                        c,
                        micro_bsz=m,
                        accumulate_grad_batches=plan.accumulate,
                        epoch_steps=c.epoch_steps * k,
                        grad_cp=1 if grad_cp else 0,
                        strategy=name,
                    )
                    return chosen, f"{words}: {found.total / 1e9:.2f} of {limit / 1e9:.2f} GB"
    rest = "Take LoRA (scripts/lora.py), a shorter --ctx_len, or a smaller model" if short else advice(plan, limit)
    raise UserError(f"--auto: nothing fits into {limit / 1e9:.2f} GB. {short}{rest}")


def _can(c: TrainConfig) -> bool:
    """Whether the flags go with their strategy, and it works here."""
    from rwkv.train.runtime import strategy  # Lightning with it, for which an estimate would wait seconds

    try:
        strategy.check(c)
    except UserError:
        return False
    return True


def advice(plan: estimate.Plan, limit: int) -> str:
    """The cheapest change that would fit, as a sentence."""
    found = search.remedy(plan, limit)
    if found is None:
        return "No change of flags that is known would fit; take a smaller model, or a larger machine"
    return f"The cheapest change that fits: {found[0]} ({estimate.estimate(found[1]).total / 1e9:.2f} GB predicted)"
