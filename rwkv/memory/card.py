"""What can be trained on a GPU of a given size, as a table by version, size and method."""

from dataclasses import replace
from typing import Any

from rwkv.adapters import state
from rwkv.memory.estimate import GB
from rwkv.memory.plan import Plan
from rwkv.memory.search import largest
from rwkv.models.version import VERSIONS, Version, published

METHODS: dict[str, dict[str, Any]] = {
    "full": {"lora": False},
    "full, adamw8bit": {"lora": False, "optimizer": "adamw8bit", "release_grads": True},
    "LoRA": {"lora": True},
    "LoRA, int8": {"lora": True, "base": "int8"},
    "LoRA, nf4": {"lora": True, "base": "nf4"},
    "LoRA, nf4, adamw8bit": {"lora": True, "base": "nf4", "optimizer": "adamw8bit", "release_grads": True},
    "state": {"lora": True, "parts": (state.PART,), "r": 1, "dora": False},
}
"""Fields of a Plan, by column."""


def longest(p: Plan, card: float) -> str:
    """The longest ctx_len at micro_bsz 1 and the largest micro_bsz at ctx_len 1024 on `card` GB,
    as text; "-" if ctx_len 1024 does not fit.
    """
    limit = round(card * GB)
    batch = largest(replace(p, ctx_len=1024), limit, "micro_bsz")
    return f"{largest(replace(p, micro_bsz=1), limit, 'ctx_len'):,}; {batch}" if batch else "-"


def table(card: float, plan: Plan, version: Version | None = None) -> str:
    """A Markdown table of all published sizes, of one version or all: what `longest` returns for
    each of METHODS with --grad_cp 1; adamw8bit with --release_grads 1. Other flags as in `plan`;
    with DeepSpeed without the methods that it does not support.
    """
    columns = {name: x for name, x in METHODS.items() if not (plan.stage and {"base", "optimizer"} & x.keys())}
    rows = [f"| RWKV | model | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for kind in [version] if version else reversed(VERSIONS.values()):
        for name in kind.PUBLISHED:
            cells = []
            for fields in columns.values():
                sizes: Any = published(name, kind)
                if state.PART in fields.get("parts", ()):
                    sizes = replace(sizes, time_state=True)
                cells.append(longest(replace(plan, sizes=sizes, grad_cp=True, **fields), card))
            rows.append(f"| {kind.NAME} | {name} | {' | '.join(cells)} |")
    return "\n".join(rows)
