"""Search for plans that fit into a given amount of memory, and format the results."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

from rwkv.memory.estimate import GB, estimate
from rwkv.memory.plan import Plan
from rwkv.memory.result import Estimate
from rwkv.models import Sizes
from rwkv.models.version import DEFAULT, Version, published, version_of

GUIDE = {version: {"1.5b": 15, "3b": 24, "7b": 48, "14b": 80} for version in ("4", "7")}
"""GB for full fine-tuning according to the community's guide, by version and model size."""


def largest(p: Plan, limit: int, what: str) -> int:
    """The largest micro_bsz or ctx_len (a multiple of 16) that fits into `limit` bytes per device;
    0 if none does.

    Args:
        what: "micro_bsz" or "ctx_len".
    """
    unit = 16 if what == "ctx_len" else 1

    def fits(count: int) -> bool:
        change: dict[str, Any] = {what: count * unit}
        return estimate(replace(p, **change)).total <= limit

    if not fits(1):
        return 0
    high = 2
    while fits(high) and high < 1 << 30:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def candidates(p: Plan, methods: Iterable[dict[str, Any]] = ({},)) -> Iterator[Plan]:
    """Plans with the effective batch size of `p`: for each of `methods` (changed fields of a Plan)
    from fast to slow, without gradient checkpointing before with it, large micro_bsz before small.
    """
    for method in methods:
        plan = replace(p, **method)
        for grad_cp in (False, True):
            for m in _divisors(p.micro_bsz):
                # accumulation needs all gradients, which release_grads frees
                if m == p.micro_bsz or not plan.release_grads:
                    accumulate = p.accumulate * p.micro_bsz // m
                    yield replace(plan, grad_cp=grad_cp, micro_bsz=m, accumulate=accumulate)


def _divisors(number: int) -> list[int]:
    """The divisors of a number, the largest first; a loop over all smaller numbers takes minutes
    for 10⁹.
    """
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)}, reverse=True)


def changes(p: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes that reduce memory, as (flags, changed plan), the cheapest first."""
    if p.bf16_copies:  # which most others exclude
        without = replace(p, bf16_copies=False)
        yield "--bf16_copies 0", without
        yield from ((f"--bf16_copies 0, {flags}", q) for flags, q in changes(without))
        return

    def flags(q: Plan) -> str:
        words = []
        if q.micro_bsz != p.micro_bsz:
            words.append(f"--micro_bsz {q.micro_bsz} --accumulate_grad_batches {q.accumulate} (same batch)")
        words += ["--grad_cp 1"] if q.grad_cp and not p.grad_cp else []
        words += [f"--precision {q.precision}"] if q.precision != p.precision else []
        words += [f"--strategy {q.strategy}"] if q.strategy != p.strategy else []
        words += [f"--optimizer {q.optimizer}"] if q.optimizer != p.optimizer else []
        words += ["--release_grads 1 --grad_clip 0"] if q.release_grads and not p.release_grads else []
        words += ["LoRA (scripts/lora.py)"] if q.lora and not p.lora else []
        words += [f"--lora_base {q.base}"] if q.base != p.base else []
        words += [f"--ctx_len {q.ctx_len}"] if q.ctx_len != p.ctx_len else []
        return ", ".join(words)

    plans = [q for q in candidates(p) if q.grad_cp or not p.grad_cp]
    *_, least = candidates(p)
    half = replace(least, precision="bf16")
    plans += [half] if p.e == 4 else []
    if p.lora and not p.stage:
        smallest = half if p.quantised else replace(half, base="nf4")
        plans += [smallest, *([replace(smallest, optimizer="adamw8bit")] if p.optimizer == "adam" else [])]
    if p.gpu and not p.stage and not p.quantised and p.optimizer == "adam":  # the only one supported with DeepSpeed
        plans += [replace(half, strategy=name) for name in deepspeed_candidates(p.devices)]
    if not p.lora:
        narrow = replace(half, optimizer="adamw8bit", strategy="auto" if p.stage else p.strategy)
        plans += [narrow]
        if p.devices == 1 and narrow.strategy == "auto" and half.accumulate == 1:
            plans += [replace(narrow, release_grads=True)]
        plans += [
            replace(half, optimizer="adafactor", strategy="auto" if p.stage else p.strategy),
            replace(half, lora=True, optimizer="adam", release_grads=False),
        ]
    context = p.ctx_len // 2
    while context >= 64:
        plans.append(replace(half, ctx_len=context))
        if not p.lora:
            plans.append(replace(half, lora=True, optimizer="adam", release_grads=False, ctx_len=context))
        context //= 2
    for q in plans:
        if q != p:
            yield flags(q), q


def deepspeed_candidates(devices: int) -> list[str]:
    """DeepSpeed strategies to try for this number of devices, from fast to slow."""
    offload = ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]
    return offload if devices == 1 else ["deepspeed_stage_2", "deepspeed_stage_3", *offload]


def cheapest_change(p: Plan, limit: int) -> tuple[str, Plan] | None:
    """The cheapest change that makes the run fit into `limit` bytes per device, as (flags, changed
    plan); None if there is none.
    """
    return next(((words, q) for words, q in changes(p) if estimate(q).total <= limit), None)


def format_estimate(p: Plan, found: Estimate, card: float = 0) -> str:
    """Format an estimate as a table in GB; with `card`, also what fits on a GPU with that many
    GB.
    """
    lines = [f"{'GB':<13}{'device':>9}{'host':>9}"]
    for name in dict.fromkeys([*found.device, *found.host]):
        row = f"{found.device.get(name, 0) / GB:>9.2f}{found.host.get(name, 0) / GB:>9.2f}"
        if row.split() != ["0.00", "0.00"]:
            lines.append(f"{name:<13}{row}")
    lines.append(f"{'total':<13}{found.total / GB:>9.2f}{found.host_total / GB:>9.2f}")
    lines.append("peaks:       " + ", ".join(f"{name} {value / GB:.2f}" for name, value in found.phases.items()))
    guide = guide_of(p.sizes)
    if guide and not p.lora:
        more = (
            "; this estimate is higher because trained weights and Adam's moments are fp32"
            if found.total > guide * GB
            else ""
        )
        lines.append(f"guide:       the community's guide says {guide} GB for full fine-tuning{more}")
    if card:
        lines += [f"{name + ':':<13}{value}" for name, value in on_card(p, card).items()]
    return "\n".join(lines)


def guide_of(s: Sizes) -> int | None:
    """The GB that the community guide states for a published model; None for other sizes."""
    version = version_of(s)
    return next((gb for name, gb in GUIDE.get(version.NAME, {}).items() if published(name, version) == s), None)


def on_card(p: Plan, card: float) -> dict[str, Any]:
    """Whether the plan fits on a card of `card` GB, the largest micro_bsz and ctx_len, and if it
    does not fit, the cheapest change.
    """
    limit = round(card * GB)
    found = estimate(p)

    def most(what: str, other: str) -> str:
        count, fixed = largest(p, limit, what), f"{other} {getattr(p, other)}"
        return f"at most {count:,} at {fixed}" if count else f"none fits at {fixed}"

    result: dict[str, Any] = {
        "fits": f"yes, on {card:g} GB"
        if found.total <= limit
        else f"no, on {card:g} GB: it needs {found.total / GB:.1f}",
        "micro_bsz": most("micro_bsz", "ctx_len"),
        "ctx_len": most("ctx_len", "micro_bsz"),
    }
    if found.total > limit:
        change = cheapest_change(p, limit)
        if change:
            less = estimate(change[1])
            host = "" if not p.gpu else f" on the card, and {less.host_total / GB:.1f} GB of host memory"
            result["to fit"] = f"{change[0]}: {less.total / GB:.1f} GB{host}"
        else:
            result["to fit"] = "no known change of flags fits; use a smaller model"
    return result


def as_dict(p: Plan, found: Estimate, card: float = 0) -> dict[str, Any]:
    """The contents of format_estimate as a dictionary, in bytes, for --json."""
    result = {
        "plan": asdict(p),
        "device": found.device,
        "host": found.host,
        "phases": found.phases,
        "device_total": found.total,
    }
    result |= {"host_total": found.host_total, "guide_gb": guide_of(p.sizes)}
    return result | ({"card_gb": card, **on_card(p, card)} if card else {})


def table(version: Version = DEFAULT) -> str:
    """The README's table: GB on one GPU (in brackets: on the host) at ctx_len 1024, micro_bsz 1,
    bf16 and --grad_cp 1; adamw8bit with --release_grads 1; and the figures of the community guide.
    """
    rows = [
        "| model | LoRA | LoRA, nf4, adamw8bit | full | full, adamw8bit | full, ZeRO-2 offload (host) | guide |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in version.PUBLISHED:
        plan = Plan(published(name, version), grad_cp=True)
        full = replace(plan, lora=False)
        narrow: dict[str, Any] = {"optimizer": "adamw8bit", "release_grads": True}
        offload = estimate(replace(full, strategy="deepspeed_stage_2_offload"))
        plans = plan, replace(plan, base="nf4", **narrow), full, replace(full, **narrow)
        cells = [f"{estimate(p).total / GB:.1f}" for p in plans]
        cells.append(f"{offload.total / GB:.1f} ({math.ceil(offload.host_total / GB)})")
        rows.append(f"| {name} | {' | '.join(cells)} | {guide_of(plan.sizes) or ''} |")
    return "\n".join(rows)
