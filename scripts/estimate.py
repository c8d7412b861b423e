"""Estimate the memory of a run before it starts.

    python scripts/estimate.py --model 7b --method lora --micro_bsz 4 --grad_cp 1 --card "RTX 4090"
    python scripts/estimate.py --load_model base.pth --method full --devices 4 \\
        --strategy deepspeed_stage_2_offload --json
    python scripts/estimate.py --gpu 8

Prints the memory on a GPU and on the host by part, the community guide's figure, what fits on a
card, and the cheapest change that would make the run fit.
"""

import json

from rwkv.cli import parse, report_errors
from rwkv.config import EstimateConfig
from rwkv.config.methods import QUANTISED_BASES
from rwkv.errors import UserError

COLUMNS = (
    *("load_model", "model", "n_layer", "n_embd", "vocab_size", "dim_att", "head_size", "dim_ffn"),
    *("method", "optimizer", "release_grads", "bf16_copies", "ctx_len", "micro_bsz", "card", "json"),
)
"""Flags that have no effect on the table of --gpu, or are its columns."""


def main(config: EstimateConfig) -> None:
    from rwkv.cards import memory_of_card
    from rwkv.memory import card as cards
    from rwkv.memory import estimate, parts, search
    from rwkv.models import version

    check(config)
    if config.table:
        print(search.table(version.named(config.version)))
        return
    if config.gpu:
        version_given = version.named(config.version) if config.version else None
        print(cards.table(memory_of_card(config.gpu), make_plan(config), version_given))
        return
    plan = make_plan(config)
    found, card = estimate.estimate(plan), memory_of_card(config.card) or memory_of_machine(config)
    if config.json:
        print(json.dumps(search.as_dict(plan, found, card), indent=2))
    else:
        s = plan.sizes
        print(
            f"L{s.n_layer} D{s.n_embd} V{s.vocab_size}, {parts.total(s) / 1e6:,.0f} million parameters, {parts.trained(plan) / 1e6:,.2f} million trained\n"
        )
        print(search.format_estimate(plan, found, card))


def check(c: EstimateConfig) -> None:
    """Raise UserError for flags that contradict each other, or that training rejects together."""
    for name, columns in (("table", ("load_model", "model", "gpu", "json")), ("gpu", COLUMNS)):
        given = [other for other in columns if getattr(c, other) != getattr(EstimateConfig, other)]
        if getattr(c, name) and given:
            raise UserError(f"--{name} prints a table of all published sizes and methods: omit --{given[0]}")
    lora, sharded = c.method != "full", c.strategy.startswith("deepspeed")
    wrong = {
        "--optimizer muon is for --method full": c.optimizer == "muon" and lora,
        f"--optimizer {c.optimizer} is not supported with --strategy {c.strategy}": c.optimizer != "adam" and sharded,
        f"--lora_base {c.lora_base} is not supported with --strategy {c.strategy}": c.lora_base in QUANTISED_BASES
        and lora
        and sharded,
        "--release_grads 1 needs --optimizer adamw8bit": c.release_grads and c.optimizer != "adamw8bit",
        "--release_grads 1 needs one device and --accumulate_grad_batches 1": c.release_grads
        and (c.devices * c.num_nodes > 1 or c.strategy != "auto" or c.accumulate_grad_batches > 1),
        "--bf16_copies 1 needs --method full, --optimizer adam, --precision bf16 and no DeepSpeed": c.bf16_copies
        and (lora or c.optimizer != "adam" or c.precision != "bf16" or sharded),
    }
    if reason := next((reason for reason, applies in wrong.items() if applies), None):
        raise UserError(f"{reason}, as in training")


def make_plan(c: EstimateConfig):
    """The plan described by the flags. Raises UserError."""
    from rwkv import checkpoint
    from rwkv.adapters import lora
    from rwkv.memory.plan import plan_of
    from rwkv.memory.zero import STRATEGIES
    from rwkv.models import version

    for name in ("ctx_len", "micro_bsz", "devices", "num_nodes", "accumulate_grad_batches", "lora_r", "ds_bucket_mb"):
        if getattr(c, name) < 1:
            raise UserError(f"--{name} must be at least 1; it is {getattr(c, name)}")
    if c.micro_bsz >= 1 << 31:
        raise UserError(f"--micro_bsz must be less than 2^31; it is {c.micro_bsz}")
    kind, sizes = version.named(c.version), None
    if c.load_model:
        tensors = checkpoint.read_tensors(c.load_model)
        sizes = checkpoint.sizes_of(tensors, c.load_model)
        checkpoint.check_shapes(tensors, sizes, c.load_model)
        kind = version.version_of(sizes)
    if c.strategy not in STRATEGIES:
        raise UserError(f"--strategy {c.strategy} is not one of {', '.join(STRATEGIES)}")
    if unknown := set(lora.parts_in(c.lora_parts)) - set(kind.PARTS.names):
        raise UserError(
            f"--lora_parts {c.lora_parts}: {', '.join(sorted(unknown))} is not one of {', '.join(kind.PARTS.names)}"
        )
    if sizes is None:
        sizes = version.published(c.model, kind) if c.model else version.new_sizes(c, kind)
    return plan_of(c, sizes, c.accelerator == "gpu", c.precision)


def memory_of_machine(c: EstimateConfig) -> float:
    """GB of this machine's GPU, or of its memory with --accelerator cpu; 0 without a GPU."""
    from rwkv.memory.machine import memory_of

    return memory_of(c.accelerator == "gpu") / 1e9


if __name__ == "__main__":
    with report_errors():
        main(parse(EstimateConfig, __doc__))
