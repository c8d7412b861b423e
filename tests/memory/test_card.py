"""The table of what can be trained on a GPU."""

import re
from dataclasses import replace

import pytest

from rwkv.config import EstimateConfig
from rwkv.errors import UserError
from rwkv.memory import card
from rwkv.memory.estimate import GB, estimate
from rwkv.memory.plan import Plan
from rwkv.models.version import VERSIONS, published
from scripts import estimate as estimate_script


def test_longest_just_fits():
    plan = Plan(published("0.4b"), grad_cp=True, base="nf4")
    context, batch = (int(number.replace(",", "")) for number in card.longest(plan, 8).split("; "))
    assert context > 1024
    for fits, more in (
        (replace(plan, ctx_len=context), {"ctx_len": context + 16}),
        (replace(plan, micro_bsz=batch), {"micro_bsz": batch + 1}),
    ):
        assert estimate(fits).total <= 8 * GB < estimate(replace(fits, **more)).total


def test_table_of_a_version(script):
    printed = script("estimate.py", "--gpu", 8, "--version", "4").stdout.strip().splitlines()
    columns = ["RWKV", "model", "full", "full, adamw8bit", "LoRA", "LoRA, int8", "LoRA, nf4", "LoRA, nf4, adamw8bit"]
    assert printed[0].strip("| ").split(" | ") == [*columns, "state"]
    rows = [line.strip("| ").split(" | ") for line in printed[2:]]
    assert [row[1] for row in rows] == [*VERSIONS["4"].PUBLISHED]
    fitting = {row[1]: {kind for kind, cell in zip(card.METHODS, row[2:], strict=True) if cell != "-"} for row in rows}
    assert fitting["0.1b"] == {*card.METHODS}
    assert fitting["7b"] == {"LoRA, nf4", "LoRA, nf4, adamw8bit"}
    assert fitting["14b"] == set()


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_tables_of_versions_without_a_documented_one(script, version):
    printed = script("estimate.py", "--table", "--version", version).stdout.strip().splitlines()
    rows = [line.strip("|").split("|") for line in printed[2:]]
    assert [row[0].strip() for row in rows] == [*VERSIONS[version].PUBLISHED]
    assert all(0 < float(row[2]) < float(row[1]) < float(row[3]) for row in rows)  # LoRA with nf4, LoRA, full


def test_columns_do_not_depend_on_the_method_of_the_plan():
    kind = VERSIONS["4"]
    expected = card.table(24, Plan(published("0.1b", kind)), kind)
    assert card.table(24, Plan(published("0.1b", kind), lora=False), kind) == expected
    sharded = card.table(24, Plan(published("0.1b", kind), strategy="deepspeed_stage_2"), kind)
    assert sharded.splitlines()[0] == "| RWKV | model | full | LoRA | state |"


CONTRADICTIONS = [
    ({"gpu": "8", "model": "7b"}, "--gpu prints a table of all published sizes and methods: omit --model"),
    ({"gpu": "8", "method": "full"}, "omit --method"),
    ({"gpu": "8", "json": True}, "omit --json"),
    ({"table": True, "json": True}, "--table prints a table of all published sizes and methods: omit --json"),
    ({"optimizer": "muon"}, "--optimizer muon is for --method full, as in training"),
    ({"bf16_copies": 1}, "--bf16_copies 1 needs --method full, --optimizer adam, --precision bf16 and no DeepSpeed"),
    ({"method": "full", "optimizer": "adafactor", "strategy": "deepspeed_stage_2"}, "adafactor is not supported with"),
    ({"lora_base": "nf4", "strategy": "deepspeed_stage_3"}, "--lora_base nf4 is not supported with --strategy"),
    ({"method": "full", "release_grads": 1}, "--release_grads 1 needs --optimizer adamw8bit"),
    ({"method": "full", "optimizer": "adamw8bit", "release_grads": 1, "devices": 2}, "--release_grads 1 needs one dev"),
]


@pytest.mark.parametrize(("flags", "message"), CONTRADICTIONS, ids=str)
def test_contradictory_flags(flags, message):
    with pytest.raises(UserError, match=message):
        estimate_script.main(EstimateConfig(**flags))


DOCS = ("docs/gpus-and-memory.md", "docs/zh/gpus-and-memory.md")


def test_documented_table(root):
    plan = Plan(published("0.1b", VERSIONS["7"]), parts=("att", "ffn"))
    rows = card.table(8, plan, VERSIONS["7"]).splitlines()
    for name in DOCS:
        assert "\n".join(rows) in (root / name).read_text(encoding="utf-8"), name


def test_documented_memory_of_quantised_bases(root):
    """GB by version, parts and --lora_base, each of four sizes."""
    rows = []
    for version, parts in (("4", Plan.parts), ("7", Plan.parts), ("7", ("att", "ffn"))):
        sizes = [published(name, VERSIONS[version]) for name in [*VERSIONS[version].PUBLISHED][-4:]]
        plans = [Plan(s, base=base, parts=parts, grad_cp=True) for base in ("auto", "int8", "nf4") for s in sizes]
        rows.append([f"{estimate(plan).total / GB:.1f}" for plan in plans])
    narrow = [replace(p, parts=Plan.parts, optimizer="adamw8bit", release_grads=True) for p in plans]
    rows.append([f"{estimate(plan).total / GB:.1f}" for plan in narrow])
    for name in DOCS:
        text = (root / name).read_text(encoding="utf-8").partition("| bf16 | int8 | nf4 |\n")[2]
        cells = [line.split(" | ", 1)[1] for line in text.splitlines()[1:5]]
        assert [re.findall(r"[\d.]+", line) for line in cells] == rows, name
