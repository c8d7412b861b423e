"""Suggested changes fit, reported maxima are maximal, and the table in the README is current."""

import json
import re
from dataclasses import replace

import pytest

from rwkv.cli import parse
from rwkv.config import EstimateConfig
from rwkv.memory import estimate as memory
from rwkv.memory import search
from rwkv.memory.estimate import estimate
from rwkv.memory.plan import Plan
from rwkv.models.version import published
from scripts import estimate as estimate_script


def test_largest_batch_and_context():
    plan = Plan(published("1.5b"), grad_cp=True)
    limit = 12 * memory.GB
    for what, unit in (("micro_bsz", 1), ("ctx_len", 16)):
        largest = search.largest(plan, limit, what)
        assert (
            estimate(replace(plan, **{what: largest})).total
            <= limit
            < estimate(replace(plan, **{what: largest + unit})).total
        )
    assert search.largest(replace(plan, lora=False), limit, "micro_bsz") == 0


@pytest.mark.parametrize("batch", [1, 12, 36, 97, (1 << 31) - 1])
def test_candidates_divide_the_batch(batch):
    plans = list(search.candidates(Plan(published("0.1b"), micro_bsz=batch)))
    sizes = [plan.micro_bsz for plan in plans]
    assert sizes == sorted(sizes[: len(sizes) // 2], reverse=True) * 2  # without, then with checkpointing
    assert {plan.micro_bsz * plan.accumulate for plan in plans} == {batch}
    if batch < 1000:
        assert set(sizes) == {m for m in range(1, batch + 1) if batch % m == 0}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_remedy_is_first_that_fits(gpu, method):
    plan = Plan(published("1.5b"), lora=method == "lora", micro_bsz=8, gpu=gpu)
    for share in (0.9, 0.6, 0.4):
        limit = round(estimate(plan).total * share)
        change, changed = search.cheapest_change(plan, limit)
        assert estimate(changed).total <= limit
        before = [q for _, q in search.changes(plan)]
        assert all(estimate(q).total > limit for q in before[: before.index(changed)])
        for flag, value in re.findall(r"--(\w+) (\w+)", change):
            if flag == "grad_clip":  # 0 with release_grads; not part of a plan
                continue
            assert str(getattr(changed, {"accumulate_grad_batches": "accumulate"}.get(flag, flag))) in (
                value,
                {"1": "True"}.get(value),
            )
    assert search.cheapest_change(plan, 1000) is None


@pytest.mark.parametrize(
    ("strategy", "optimizer"), [("auto", "adam"), ("auto", "adafactor"), ("deepspeed_stage_2", "adam")]
)
def test_no_adafactor_with_deepspeed(strategy, optimizer):
    plan = Plan(published("1.5b"), lora=False, strategy=strategy, optimizer=optimizer)
    changed = [q for _, q in search.changes(plan)]
    assert any(q.optimizer == "adafactor" for q in changed)
    assert not any(q.optimizer == "adafactor" and q.stage for q in changed)


@pytest.mark.parametrize("gpu", [False, True])
def test_copies_are_dropped_first(gpu):
    """Other changes, such as adamw8bit and DeepSpeed, are rejected with --bf16_copies 1."""
    plan = Plan(published("0.4b"), lora=False, bf16_copies=True, grad_cp=True, ctx_len=256, gpu=gpu)
    (first, without), *others = search.changes(plan)
    assert (first, without) == ("--bf16_copies 0", replace(plan, bf16_copies=False))
    assert estimate(without).total < estimate(plan).total
    assert len(others) > 3
    assert not any(q.bf16_copies for _, q in others)
    assert all(flags.startswith("--bf16_copies 0, ") for flags, _ in others)


def test_readme_table(root, script):
    table = script("estimate.py", "--table", fresh=True).stdout.strip()
    assert table == search.table()
    head = table.splitlines()[0]
    for name in ("README.md", "README.zh.md"):
        text = (root / name).read_text(encoding="utf-8")
        assert head in text.splitlines()
        assert table.splitlines()[2:] == [line for line in text.splitlines() if re.match(r"\| [\d.]+b \|", line)], name


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_flags_for_8_gb(root, name):
    """The flags under the table are those of its column, and make 7.2b fit, but not 13.3b."""
    text = (root / name).read_text(encoding="utf-8")
    flags = re.search(r"`(--lora_base nf4 --[^`]+)`", text)[1].split()
    assert flags[-2:] == ["--grad_clip", "0"]  # which release_grads needs
    for model, fits in (("7.2b", True), ("13.3b", False)):
        config = parse(EstimateConfig, "", ["--model", model, *"--micro_bsz 1 --grad_cp 1".split(), *flags[:-2]])
        needed = estimate(estimate_script.make_plan(config)).total / memory.GB
        assert (needed <= 8) == fits
        assert f"{needed:.1f}" == re.search(rf"^\| {model} \| [\d.]+ \| ([\d.]+) \|", text, re.MULTILINE)[1]


def test_estimate_output(script, make_base):
    printed = script("estimate.py", "--model", "7b", "--method", "full", "--card", 24).stdout
    assert "no, on 24 GB" in printed
    assert "48 GB" in printed
    assert not [line for line in printed.splitlines() if line.endswith("0.00     0.00")]
    printed = script(
        "estimate.py", "--model", "3b", "--method", "full", "--grad_cp", 1, "--micro_bsz", 1, "--card", "RTX 4090"
    ).stdout
    # the cost of a change includes host memory
    assert re.search(
        r"to fit: +--strategy deepspeed_stage_2_offload: 8\.\d GB on the card, and \d\d\.\d GB of host memory",
        printed,
    ), printed
    assert "micro_bsz:   none fits at ctx_len 1024" in printed
    assert "got 24GB" in script("estimate.py", "--model", "3b", "--card", "24GB", status=1).stderr
    found = json.loads(
        script("estimate.py", "--load_model", make_base(), "--card", 24, "--micro_bsz", 2, "--json").stdout
    )
    assert found["plan"]["sizes"]["n_embd"] == 16
    assert found["fits"].startswith("yes")
    assert found["device_total"] == sum(found["device"].values())
    printed = script("estimate.py", "--model", "0.1b", "--optimizer", "muon", status=1).stderr
    assert "--optimizer muon is for --method full, as in training" in printed
    assert "--model 9b is not one of 0.1b" in script("estimate.py", "--model", "9b", status=1).stderr
