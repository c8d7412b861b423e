"""Runs with --optimizer muon: versions, resuming, accumulation, two ranks, errors."""

import importlib
import json

import pytest
import torch

from rwkv.checkpoint import read_tensors
from rwkv.config import DPOConfig, LoRAConfig, StateConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.train import checks
from rwkv.train.fit import fit
from rwkv.train.loop import cuda_graph
from rwkv.train.resume import state_files
from tests.train.small_runs import SMALL, TUNE, lines, poisoned

RUN = {**SMALL, "version": "7", "n_embd": 32, "head_size": 16, "epoch_steps": 6, "epoch_count": 1}
NAMES = {"fp32": "float32", "bf16": "bfloat16"}
MUON = {"optimizer": "muon", "lr_init": 3e-3, "lr_final": 1e-3, "weight_decay": 0.1}


@pytest.fixture
def train(make_data, tmp_path):
    """Train a new model (RWKV-7 unless given); returns the losses and the weights."""
    data = make_data(400)

    def run(name, **flags):
        given = {**RUN, **MUON, "data_file": data, "proj_dir": str(tmp_path / name), **flags}
        if given["version"] == "4":
            del given["head_size"]
        result = fit(TrainConfig(**given))
        return [line["loss"] for line in lines(tmp_path / name)], read_tensors(result.checkpoint)

    return run


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_matches_uninterrupted(train, tmp_path, version, precision):
    flags = {"version": version, "precision": precision}
    losses, weights = train("whole", **flags)
    train("parts", max_steps=3, **flags)
    state = state_files.newest(tmp_path / "parts")
    assert set(state.optimizer["blocks.1.ffn.key.weight"]) == {"momentum"}
    assert set(state.optimizer["head.weight"]) == {"step", "moment1", "moment2"}
    resumed, again = train("parts", **flags)
    assert resumed == losses
    assert same(again, weights)
    assert {x.dtype for x in weights.values()} == {torch.float32}
    types = json.loads((tmp_path / "whole/run.json").read_text())["types"]
    assert f"Muon's momentum and AdamW's moments float32, matmuls of Muon {NAMES[precision]}" in types


def test_accumulation(train):
    """Two micro-batches are the batch of both, up to rounding, which the iteration amplifies."""
    whole, _ = train("whole", micro_bsz=4)
    halves, _ = train("halves", accumulate_grad_batches=2, epoch_steps=12)
    assert halves == pytest.approx(whole, rel=1e-4)


def test_gradients_are_clipped(train):
    """Muon's update does not depend on the scale of the gradients, if all are scaled alike."""
    assert train("clipped", grad_clip=1e-3)[0] != train("free", grad_clip=0.0)[0]


def test_nan_batch_skipped(make_base, tmp_path):
    flags = poisoned(make_base, tmp_path) | {"optimizer": "muon"}
    result = fit(TrainConfig(**flags, proj_dir=str(tmp_path / "run"), on_nan="skip"))
    norms = [line["grad_norm"] for line in lines(tmp_path / "run")]
    assert None in norms
    assert norms[-1] is not None
    assert all(bool(x.isfinite().all()) for x in read_tensors(result.checkpoint).values())
    with pytest.raises(UserError, match="the loss is nan"):
        fit(TrainConfig(**flags, proj_dir=str(tmp_path / "stopped")))


def test_two_ranks_take_equal_steps(two_ranks, root):
    program = root / "tests/train/two_ranks_step.py"
    assert two_ranks(program, "muon", GLOO_SOCKET_IFNAME="lo").count("equal") == 2


@pytest.mark.parametrize("kind", [LoRAConfig, StateConfig, DPOConfig])
def test_not_for_adapters(kind, make_base, make_data, tmp_path):
    flags = {"load_model": str(make_base()), "data_file": make_data(200), "proj_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match="adapters and states are trained with Adam: omit it"):
        fit(kind(**TUNE, **flags, optimizer="muon"))


def test_not_with_deepspeed():
    for name in ("deepspeed_stage_1", "deepspeed_stage_3_offload"):
        with pytest.raises(UserError, match=f"not supported with DeepSpeed .--strategy {name}.*--strategy auto or ddp"):
            checks.check_muon(TrainConfig(optimizer="muon", strategy=name))
    checks.check_muon(TrainConfig(optimizer="muon", strategy="ddp"))


def test_resumed_run_not_with_deepspeed(make_data, monkeypatch):
    """The optimizer of run.json is checked like that of a flag."""
    monkeypatch.setattr("rwkv.train.runtime.strategy.check", lambda c: None)  # needs GPUs on cu117
    c = TrainConfig(data_file=make_data(200), strategy="deepspeed_stage_2", precision="bf16")
    with pytest.raises(UserError, match="--optimizer muon is not supported with DeepSpeed"):
        importlib.import_module("rwkv.train.resolve")._optimizer_of(c, {"flags": {"optimizer": "muon"}})


def test_release_grads_needs_adamw8bit(train):
    with pytest.raises(UserError, match="--release_grads 1 needs --optimizer adamw8bit; with --optimizer muon"):
        train("run", release_grads=1, grad_clip=0.0)


def test_cuda_graph_allowed():
    assert cuda_graph._why_not(TrainConfig(version="7", optimizer="muon"), on_gpu=True) is None


@pytest.mark.parametrize(("first", "second"), [("muon", "adam"), ("adam", "muon"), ("adamw8bit", "muon")])
def test_resume_with_other_optimizer(train, first, second):
    train("run", optimizer=first, max_steps=2)
    with pytest.raises(UserError, match=f"it was saved with --optimizer {first}, but this run has {second}"):
        train("run", optimizer=second, allow_changes=True)
