"""What fits into a given memory, the cheapest change that would, and how both are told."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

from rwkv.memory.estimate import GB, Estimate, Plan, estimate
from rwkv.models import Sizes
from rwkv.models.version import DEFAULT, published

GUIDE = {"1.5b": 15, "3b": 24, "7b": 48, "14b": 80}
"""GB that the community's guide says full tuning takes, by size; less than half of it with LoRA and DeepSpeed."""


def largest(p: Plan, limit: int, what: str) -> int:
    """The largest micro_bsz or ctx_len (a multiple of 1 or 16) whose device total is within `limit` bytes; 0 if none is."""
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


def candidates(p: Plan, strategies: Iterable[str]) -> Iterator[Plan]:
    """Plans with the effective batch of `p`, those that cost least time first: without gradient checkpointing before with it,
    a large micro_bsz before a small one."""
    for strategy in strategies:
        for grad_cp in (False, True):
            for m in range(p.micro_bsz, 0, -1):
                if p.micro_bsz % m == 0:
                    accumulate = p.accumulate * p.micro_bsz // m
                    yield replace(p, strategy=strategy, grad_cp=grad_cp, micro_bsz=m, accumulate=accumulate)


def changes(p: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes that take less memory, the cheapest first, each as flags and the plan that they make."""

    def flags(q: Plan) -> str:
        words = []
        if q.micro_bsz != p.micro_bsz:
            words.append(f"--micro_bsz {q.micro_bsz} --accumulate_grad_batches {q.accumulate} (the same step)")
        words += ["--grad_cp 1"] if q.grad_cp and not p.grad_cp else []
        words += [f"--precision {q.precision}"] if q.precision != p.precision else []
        words += [f"--strategy {q.strategy}"] if q.strategy != p.strategy else []
        words += [f"--optimizer {q.optimizer}"] if q.optimizer != p.optimizer else []
        words += ["LoRA (scripts/lora.py)"] if q.lora and not p.lora else []
        words += [f"--ctx_len {q.ctx_len}"] if q.ctx_len != p.ctx_len else []
        return ", ".join(words)

    tried = [q for q in candidates(p, [p.strategy]) if q.grad_cp or not p.grad_cp]
    least = replace(p, grad_cp=True, micro_bsz=1, accumulate=p.accumulate * p.micro_bsz)
    half = replace(least, precision="bf16")
    tried += [half] if p.e == 4 else []
    if p.gpu and not p.stage and p.optimizer == "adam":  # DeepSpeed takes no other
        tried += [replace(half, strategy=name) for name in offered(p.devices)]
    if not p.lora:
        tried += [
            replace(half, optimizer="adafactor", strategy="auto" if p.stage else p.strategy),
            replace(half, lora=True, optimizer="adam"),
        ]
    context = p.ctx_len // 2
    while context >= 64:
        tried.append(replace(half, ctx_len=context))
        if not p.lora:
            tried.append(replace(half, lora=True, ctx_len=context))
        context //= 2
    for q in tried:
        if q != p:
            yield flags(q), q


def offered(devices: int) -> list[str]:
    """DeepSpeed strategies that take less memory, those that cost least time first."""
    alone = ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]
    return alone if devices == 1 else ["deepspeed_stage_2", "deepspeed_stage_3", *alone]


def remedy(p: Plan, limit: int) -> tuple[str, Plan] | None:
    """The cheapest change by which the run fits into `limit` bytes a device; None if none is known."""
    return next(((words, q) for words, q in changes(p) if estimate(q).total <= limit), None)


def in_words(p: Plan, found: Estimate, card: float = 0) -> str:
    """Tables of the parts, in GB, and what fits on a card of `card` GB."""
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
            "; more is computed here, as trained weights and Adam's moments are fp32"
            if found.total > guide * GB
            else ""
        )
        lines.append(f"guide:       the community's guide says {guide} GB for tuning all weights{more}")
    if card:
        lines += [f"{name + ':':<13}{value}" for name, value in on_card(p, card).items()]
    return "\n".join(lines)


def guide_of(s: Sizes) -> int | None:
    """The guide's GB for a published size, or None."""
    return next((gb for name, gb in GUIDE.items() if DEFAULT.PUBLISHED[name] == s), None)


def on_card(p: Plan, card: float) -> dict[str, Any]:
    """Whether the plan fits on a card of `card` GB, the largest batch and context on it, and the cheapest change where it does not."""
    limit = round(card * GB)
    found = estimate(p)

    def most(what: str, other: str) -> str:
        count, fixed = largest(p, limit, what), f"{other} {getattr(p, other)}"
        return f"at most {count:,} at {fixed}" if count else f"none fits at {fixed}"

    answer: dict[str, Any] = {
        "fits": f"yes, on {card:g} GB"
        if found.total <= limit
        else f"no, on {card:g} GB: it needs {found.total / GB:.1f}",
        "micro_bsz": most("micro_bsz", "ctx_len"),
        "ctx_len": most("ctx_len", "micro_bsz"),
    }
    if found.total > limit:
        change = remedy(p, limit)
        if change:
            less = estimate(change[1])
            host = "" if not p.gpu else f" on the card, and {less.host_total / GB:.1f} GB of the machine's memory"
            answer["to fit"] = f"{change[0]}: {less.total / GB:.1f} GB{host}"
        else:
            answer["to fit"] = "no known change makes it fit; use a smaller model"
    return answer


def as_dict(p: Plan, found: Estimate, card: float = 0) -> dict[str, Any]:
    """The same for programs, in bytes."""
    answer = {
        "plan": asdict(p),
        "device": found.device,
        "host": found.host,
        "phases": found.phases,
        "device_total": found.total,
    }
    answer |= {"host_total": found.host_total, "guide_gb": guide_of(p.sizes)}
    return answer | ({"card_gb": card, **on_card(p, card)} if card else {})


def table() -> str:
    """README's table: GB a GPU at ctx_len 1024, micro_bsz 1, bf16 with --grad_cp 1, one GPU; and beside it the guide's."""
    rows = [
        "| model | LoRA | full | full, Adafactor | full, ZeRO-2 offload (host) | guide |",
        "|---|---|---|---|---|---|",
    ]
    for name in DEFAULT.PUBLISHED:
        plan = Plan(published(name), grad_cp=True)
        full = replace(plan, lora=False)
        factored, spread = (
            estimate(replace(full, optimizer="adafactor")),
            estimate(replace(full, strategy="deepspeed_stage_2_offload")),
        )
        cells = [f"{estimate(q).total / GB:.1f}" for q in (plan, full)] + [f"{factored.total / GB:.1f}"]
        cells.append(f"{spread.total / GB:.1f} ({math.ceil(spread.host_total / GB)})")
        rows.append(f"| {name} | {' | '.join(cells)} | {GUIDE.get(name, '')} |")
    return "\n".join(rows)
