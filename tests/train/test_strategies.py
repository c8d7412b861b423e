"""Every strategy, with two processes, takes the same steps as one process with the same global
batch.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from rwkv import compat
from rwkv.checkpoint import read_tensors
from tests.train import strategy_runs
from tests.train.small_runs import column, lines
from tests.train.strategy_runs import (
    BAD_GRADIENTS,
    BF16,
    CASES,
    OWN_SEEDS,
    SOLO,
    STEPS,
    STRATEGIES,
    STRATEGY_CHANGES,
    TWO_PROCESSES,
    WAITS,
)

TOLERANCE = 1e-5  # fp32, different summation order; measured 2e-7


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_model) -> Path:
    """The folder with a subfolder per run."""
    folder = tmp_path_factory.mktemp("strategies")
    strategy_runs.run_all(folder, make_model)
    return folder


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}, {case}" for name, case in CASES])
def test_two_processes_match_one(runs, name, case):
    alone, run = runs / TWO_PROCESSES[case][0], runs / f"{name}, {case}"
    assert len(column(run)) == STEPS
    for key in ("loss", "val_loss", "lr", "targets", "grad_norm"):
        assert column(run, key) == pytest.approx(column(alone, key), rel=TOLERANCE), key
    for key in ("reward_margin", "reward_chosen", "val_reward_margin", "val_reward_accuracy"):
        # differences of log-probabilities of about 50
        assert column(run, key) == pytest.approx(column(alone, key), rel=1e-3, abs=1e-5), key
    ours, theirs = read_tensors(run / "rwkv-0.pth"), read_tensors(alone / "rwkv-0.pth")
    assert ours.keys() == theirs.keys()
    for key in ours:
        # four steps of Adam on gradients that differ as above
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", OWN_SEEDS)
def test_weights_of_rank_0_on_all_ranks(runs, name):
    """These processes have no store to pass rank 0's seed on."""
    assert column(runs / f"{name}, own seeds") == pytest.approx(column(runs / f"{name}, seed of rank 0"), rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("before", "after"), STRATEGY_CHANGES)
def test_resume_with_other_strategy(runs, before, after, kind):
    run, alone = runs / f"{before}, then {after}, {kind}", runs / {"full": "clipped", "lora": "lora"}[kind]
    assert [line["step"] for line in lines(run)] == [*range(1, STEPS + 1)]
    assert column(run) == pytest.approx(column(alone), rel=TOLERANCE)


@pytest.mark.parametrize("name", SOLO)
def test_deepspeed_single_process_matches_plain(runs, name):
    run, plain = runs / f"{name}, one process", runs / ("clipped" if SOLO[name][0] == "full" else "lora")
    assert len(column(run)) == STEPS
    for key in ("loss", "grad_norm"):
        assert column(run, key) == pytest.approx(column(plain, key), rel=TOLERANCE), key


@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_nan_gradient_ends_run_except_fp16(runs, case):
    """In fp16 such steps are skipped, to find the loss scale. In other precisions no step may be
    skipped silently.
    """
    norms = [line["grad_norm"] for line in lines(runs / case)]  # None: NaN or Inf
    if " fp16" in case:
        assert norms[2] is None
        assert len(norms) == STEPS
        assert all(norms[3:])
        assert not (runs / case / "error.txt").exists()
    else:
        assert norms[2:] == [None]
        printed = (runs / case / "error.txt").read_text()
        assert re.match(r"step 3: the norm of the gradient is (nan|inf)", printed)
        assert "--on_nan skip" not in printed  # not supported with DeepSpeed


def test_invalid_ds_config_value(runs):
    printed = (runs / "invalid/error.txt").read_text()
    assert printed.startswith(f"--ds_config {runs / 'wrong.json'}: rejected by DeepSpeed (")
    assert "sub_group_size" in printed


def facts(run: Path) -> dict:
    return json.loads((run / "facts.json").read_text())


def test_deepspeed_compiles_nothing(runs):
    """ninja, g++ and Python.h may be missing at run time:
    https://github.com/BlinkDL/RWKV-LM/issues/158,
    https://github.com/deepspeedai/DeepSpeed/issues/1687
    """
    assert not (runs / "compiled").exists()


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "ddp"])
def test_deepspeed_overhead(runs, name):
    full, lora = facts(runs / f"{name}, full"), facts(runs / f"{name}, lora with gradient checkpointing")
    trained = sum(value.numel() for value in read_tensors(runs / "base.pth").values())
    assert full["bucket"] == trained  # --ds_bucket_mb 1 would be a million
    assert lora["bucket"] < full["bucket"] / 5
    assert full["gathered"] == lora["gathered"] == 0  # ZeRO-3 gathers no parameter for a full pass
    if name == "deepspeed_stage_3":
        assert facts(runs / f"{name}, RWKV-7")["gathered"] == 0
    assert full["timed"] == lora["timed"] == 0  # DeepSpeed's timers would synchronise with the GPU
    if compat.stack() == "cu117":  # the model is on the device before torch's fused Adam checks it
        assert full["moved"][0] == "cpu"


@pytest.mark.parametrize(("name", "kind"), WAITS)
def test_deepspeed_waits_for_the_device(runs, name, kind):
    """A step's waits do not depend on the number of tensors: they are for an overflow flag, and for
    the norms of at most 4 groups of parameters.
    """
    found = facts(runs / f"{name}, {kind}, waits")
    each = sum(found["waits"].values()) / (STEPS - 2)
    if compat.stack() == "cu117":  # and 2 synchronisations; up to 3 waits for a value: read, copied, read
        limit = 9 if name == "deepspeed_stage_3" else 17
    else:
        limit = 1 if name == "deepspeed_stage_3" else 5
    assert 0 < each <= limit < found["tensors"] / 2


def test_deepspeed_warns_once(runs):
    printed = (runs / "paired0.txt").read_text()
    assert printed.count("unknown inputs or outputs") <= 1


def test_accumulation_matches_single_batch(runs):
    assert column(runs / "accumulated") == pytest.approx(column(runs / "scaled"), rel=TOLERANCE)


def test_comparison_detects_differences(runs):
    """Clipping and the gradient scale affect the losses by far more than the tolerance."""
    clipped, scaled = column(runs / "clipped"), column(runs / "scaled")
    assert clipped[0] == scaled[0]
    assert max(abs(a / b - 1) for a, b in zip(clipped[1:], scaled[1:], strict=True)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", BF16)
@pytest.mark.parametrize(("kind", "alone"), [("full", "clipped"), ("lora", "lora")])
def test_deepspeed_bf16(runs, name, kind, alone):
    # DeepSpeed stores bf16 parameters (8 significant bits) and fp32 master weights; autocast rounds
    # in matmuls only
    run = runs / f"{name}, {kind}, bf16"
    assert column(run) == pytest.approx(column(runs / alone), rel=0.02)
    assert column(run) != column(runs / alone)
    recorded = facts(run)
    assert (recorded["weights"], recorded["masters"]) == (["torch.bfloat16"], ["torch.float32"])
    saved = read_tensors(run / "rwkv-0.pth")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    # the master weights were saved: not all elements of a matrix are exact in bf16
    matrices = [value for value in saved.values() if value.dim() == 2]
    assert all(not torch.equal(value, value.bfloat16().float()) for value in matrices)


@pytest.mark.parametrize("name", BF16)
def test_deepspeed_bf16_resume(runs, name):
    uninterrupted, stopped = runs / f"{name}, full, bf16", runs / f"{name}, bf16, stopped"
    assert column(stopped) == column(uninterrupted)
    assert len(column(uninterrupted)) == STEPS
    ours, theirs = read_tensors(stopped / "rwkv-0.pth"), read_tensors(uninterrupted / "rwkv-0.pth")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
