"""Runs with --bf16_copies 1 give the losses and weights of runs without it, bit for bit."""

import json

import pytest
import torch

from rwkv.config import DPOConfig, LoRAConfig, StateConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.kernels import bf16_copy, load
from rwkv.kernels.linear import Matrix
from rwkv.train import checks
from rwkv.train.fit import fit
from rwkv.train.loop import adam, module, optimizer
from rwkv.train.resume import state_files
from tests.train import fused_adam_on_cpu
from tests.train.small_runs import SMALL, TUNE, assert_same_tensors, lines, poisoned

RUN = {**SMALL, "n_embd": 32, "precision": "bf16", "epoch_steps": 5, "epoch_count": 1, "lr_init": 1e-2}
COPIES = {"bf16_copies": 1}


@pytest.fixture
def train(make_data, tmp_path):
    """Train a new RWKV-4 or RWKV-7 model; returns the losses and the checkpoint."""
    data = make_data(400)

    def run(name, **flags):
        given = {**RUN, "data_file": data, "proj_dir": str(tmp_path / name), **flags}
        if given["version"] == "7":
            given["head_size"] = 16
        result = fit(TrainConfig(**given))
        return [(line["loss"], line.get("grad_norm")) for line in lines(tmp_path / name)], result.checkpoint

    return run


@pytest.fixture
def uses(monkeypatch):
    """How many matrices had a copy after each step, all of them right and in use."""
    found = []
    end = module.TrainingModule.on_train_batch_end

    def checked(self, *arguments):
        end(self, *arguments)
        weights = [layer.weight for layer in self.model.modules() if isinstance(layer, Matrix)]
        copies = [w.bf16_copy.tensor for w in weights if hasattr(w, "bf16_copy")]
        assert len(copies) in (0, len(weights))
        found.append(len(copies))
        for w, copied in zip(weights, copies, strict=False):
            assert torch.equal(copied, w.detach().bfloat16())
            assert bf16_copy.cached(w, torch.bfloat16) is copied

    monkeypatch.setattr(module.TrainingModule, "on_train_batch_end", checked)
    return found


@pytest.mark.parametrize("flags", [{}, {"grad_cp": 1}, {"accumulate_grad_batches": 2, "epoch_steps": 6}], ids=str)
@pytest.mark.parametrize("version", ["4", "7"])
def test_same_bits(train, uses, version, flags):
    losses, weights = train("without", version=version, **flags)
    assert set(uses) == {0}
    uses.clear()
    again, same_weights = train("with", version=version, **COPIES, **flags)
    # v4: seven matrices a block, v7: six; and the head
    assert set(uses) == {2 * 7 + 1 if version == "4" else 2 * 6 + 1}
    assert again == losses
    assert_same_tensors(same_weights, weights)


@pytest.mark.parametrize("path", ["fused", "plain"])
def test_same_bits_with_torch_optimizers(train, uses, monkeypatch, path):
    """The fused one of GPUs, and torch's Adam if the kernels are not compiled, whose copies are
    written after the step.
    """
    if path == "fused":
        fused_adam_on_cpu.use_on_cpu(monkeypatch)
    else:
        monkeypatch.setattr(adam, "supports", lambda groups: False)
    losses, weights = train("without", version="7", weight_decay=0.1)
    again, same_weights = train("with", version="7", weight_decay=0.1, **COPIES)
    assert set(uses) == {0, 13}
    assert again == losses
    assert_same_tensors(same_weights, weights)


@pytest.mark.parametrize("version", ["4", "7"])
def test_resumed_with_and_without(train, tmp_path, version):
    """The flag may change when a run is resumed, and no file contains a copy."""
    losses, weights = train("whole", version=version)
    for name, first, then in (("on", COPIES, {}), ("off", {}, COPIES), ("both", COPIES, COPIES)):
        train(name, version=version, max_steps=2, **first)
        state = state_files.newest(tmp_path / name)
        assert {x.dtype for x in state.weights.values()} == {torch.float32}
        again, same_weights = train(name, version=version, **then)
        assert again == losses
        assert_same_tensors(same_weights, weights)
    sizes = {(tmp_path / name / "rwkv-0.pth").stat().st_size for name in ("whole", "both")}
    assert len(sizes) == 1
    types = json.loads((tmp_path / "both/run.json").read_text())["types"]
    assert "trained weights float32 (they are the master weights), bfloat16 copies of matrices," in types
    assert "copies" not in json.loads((tmp_path / "whole/run.json").read_text())["types"]


def test_validation_samples_and_dropout(train, uses, tmp_path):
    """Callbacks use the model between steps."""
    flags = {"version": "7", "dropout": 0.1, "val_split": 0.2, "val_every": 2, "sample_every": 3, "n_layer": 1}
    losses, weights = train("without", **flags)
    again, same_weights = train("with", **flags, **COPIES)
    assert again == losses
    assert_same_tensors(same_weights, weights)
    one, other = (
        [{k: v for k, v in line.items() if k.startswith("val")} for line in lines(tmp_path / name)]
        for name in ("without", "with")
    )
    assert one == other
    assert any(one)
    assert (tmp_path / "without/samples.jsonl").read_bytes() == (tmp_path / "with/samples.jsonl").read_bytes()


def test_skipped_step(make_base, tmp_path, uses):
    """Weights and copies stay as they are."""
    flags = poisoned(make_base, tmp_path) | {"on_nan": "skip", "precision": "bf16"}
    with_copies = fit(TrainConfig(**flags, **COPIES, proj_dir=str(tmp_path / "with")))
    assert None in [line["grad_norm"] for line in lines(tmp_path / "with")]
    assert all(uses)
    without = fit(TrainConfig(**flags, proj_dir=str(tmp_path / "without")))
    assert_same_tensors(with_copies.checkpoint, without.checkpoint)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"precision": "fp32"}, "matmuls in fp32 do not read them; use --precision bf16"),
        ({"precision": "fp16"}, "matmuls in fp16 do not read them"),
        ({"strategy": "deepspeed_stage_2"}, "with --strategy deepspeed_stage_2 DeepSpeed keeps bf16 weights"),
        ({"optimizer": "adamw8bit"}, "with --optimizer adamw8bit the matrices are bf16 anyway"),
        ({"optimizer": "muon"}, "--optimizer muon does not write them; use adam"),
        ({"optimizer": "adafactor"}, "--optimizer adafactor does not write them; use adam"),
    ],
)
def test_rejected(flags, reason):
    with pytest.raises(UserError, match=f"--bf16_copies 1: {reason}.*, or omit --bf16_copies"):
        checks.check_bf16_copies(TrainConfig(**{"precision": "bf16", **COPIES, **flags}))
    checks.check_bf16_copies(TrainConfig(**{"precision": "bf16", **flags}))


@pytest.mark.parametrize("kind", [LoRAConfig, StateConfig, DPOConfig])
def test_not_for_adapters(kind, make_base, make_data, tmp_path):
    flags = {"load_model": str(make_base()), "data_file": make_data(200), "proj_dir": str(tmp_path / "run")}
    with pytest.raises(
        UserError, match="--bf16_copies 1: .* trains no linear layers of the model; use scripts/finetune.py, or omit"
    ):
        fit(kind(**{**TUNE, "precision": "bf16"}, **flags, **COPIES))


def test_precision_chosen_automatically(train, monkeypatch):
    monkeypatch.setattr("rwkv.train.resolve.precision_of", lambda c: "fp32")
    with pytest.raises(UserError, match="matmuls in fp32 do not read them"):
        train("run", precision="auto", **COPIES)


def test_step_of_the_kernel_writes_the_copy(make_model, monkeypatch):
    """In the same pass, without a cast afterwards."""
    assert load.why_unavailable() is None
    model = make_model(version="7")
    model.head.keep_bf16_copy()
    opt = optimizer.make(model, TrainConfig(lr_init=0.1, **COPIES))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model.head.weight.detach().clone()
    opt.step()
    assert not torch.equal(model.head.weight, before)
    expected = model.head.weight.detach().bfloat16()
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    assert torch.equal(bf16_copy.cached(model.head.weight, torch.bfloat16), expected)
