"""Runs with --optimizer adamw8bit: versions, resuming, released gradients, two ranks, errors."""

import json
import math
from dataclasses import replace

import pytest
import torch

from rwkv import checkpoint, compat
from rwkv.checkpoint import load_model, read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.kernels import adamw
from rwkv.memory import auto, machine
from rwkv.memory.estimate import estimate
from rwkv.memory.plan import plan_of
from rwkv.memory.zero import DDP
from rwkv.train.fit import fit
from rwkv.train.loop import adamw8bit, cuda_graph, optimizer
from rwkv.train.resume import state_files
from tests.train.small_runs import lines, poisoned

# matrices of 4096 elements and more have moments in 8 bits
SIZES = {"n_layer": 2, "n_embd": 64, "head_size": 32, "vocab_size": 70}
RUN = {
    "ctx_len": 8,
    "micro_bsz": 2,
    "epoch_steps": 6,
    "epoch_count": 1,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "bf16",
    "optimizer": "adamw8bit",
    "lr_init": 3e-3,
    "lr_final": 1e-3,
    "weight_decay": 0.1,
}
RELEASED = {"release_grads": 1, "grad_clip": 0.0}


@pytest.fixture
def train(make_data, tmp_path):
    """Train a new model (RWKV-7 unless given); returns the losses and the weights."""
    data = make_data(400)

    def run(name, **flags):
        sizes = {key: value for key, value in SIZES.items() if key != "head_size" or flags.get("version") != "4"}
        config = TrainConfig(
            **{**RUN, **sizes, "version": "7", "data_file": data, "proj_dir": str(tmp_path / name), **flags}
        )
        result = fit(config)
        return [line["loss"] for line in lines(tmp_path / name)], read_tensors(result.checkpoint)

    return run


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_resumed_run_matches_uninterrupted(train, tmp_path, version):
    losses, weights = train("whole", version=version)
    train("parts", version=version, max_steps=4)
    state = state_files.newest(tmp_path / "parts")
    kinds = {x.dtype for moments in state.optimizer.values() for x in moments.values() if torch.is_tensor(x)}
    assert kinds == {torch.uint8, torch.float32}
    assert state.weights["head.weight"].dtype == torch.bfloat16
    assert {moments["step"] for moments in state.optimizer.values()} == {4}
    resumed, again = train("parts", version=version)
    assert resumed == losses
    assert same(again, weights)
    assert {name: x.dtype == torch.bfloat16 for name, x in weights.items()} == {
        name: name.endswith(".weight") and x.dim() == 2 for name, x in weights.items()
    }
    assert version == load_model(tmp_path / "parts/rwkv-0.pth").version.NAME


def test_close_to_adam(train):
    """Six steps, with moments that start from 0."""
    # 0.5 %, depending on the instructions of the CPU
    assert train("ours")[0] == pytest.approx(train("adam", optimizer="adam")[0], rel=0.015)


@pytest.mark.parametrize("flags", [{}, {"grad_cp": 1}, {"precision": "fp32"}, {"version": "4"}], ids=str)
def test_released_gradients_give_same_weights(train, flags):
    losses, weights = train("kept", grad_clip=0.0, **flags)
    released, same_weights = train("released", **RELEASED, **flags)
    assert released == losses
    assert same(same_weights, weights)


def test_resumed_run_releases_with_current_rates(train):
    """Learning rate and weight decay of the schedule, not those of the optimizer's creation."""
    losses, weights = train("whole", **RELEASED)
    train("parts", **RELEASED, max_steps=2)
    resumed, again = train("parts", **RELEASED)
    assert resumed == losses
    assert same(again, weights)


def test_released_gradients_are_freed(make_model):
    """During the backward pass at most a few matrices have a gradient."""
    model = make_model(version="7", n_layer=3)
    opt = optimizer.make(model, TrainConfig(optimizer="adamw8bit", release_grads=1))
    alive, update = [], opt._update

    def counted(*arguments):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        update(*arguments)

    opt._update = counted
    x = torch.randint(50, (2, 8))
    model.head(model.hidden(x)[0], x).backward()
    assert len(alive) == sum(p.requires_grad for p in model.parameters())
    assert max(alive) == 1
    assert opt.set_clip(1.0) is None


def test_accumulation(train):
    """Two micro-batches are the batch of both, up to the rounding of gradients to bf16."""
    whole, _ = train("whole", micro_bsz=4)
    halves, _ = train("halves", accumulate_grad_batches=2, epoch_steps=12)
    assert halves == pytest.approx(whole, rel=0.01)


def test_gradient_norm_and_clipping(make_model):
    for limit in (math.inf, 0.1):
        model = make_model(version="7")
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
        expected = 0.5 * sum(p.numel() for p in model.parameters()) ** 0.5
        opt = optimizer.make(model, TrainConfig(optimizer="adamw8bit", adam_eps=1e-3))
        assert float(opt.set_clip(limit)) == pytest.approx(expected, rel=1e-5)  # a sum in fp32
        assert all(bool((p.grad == 0.5).all()) for p in model.parameters())  # scaled in the step
        opt.step()
        first = opt.state[model.ln_out.weight]["moment1"].tolist()
        assert first == pytest.approx([0.05 * min(1, limit / expected)] * 16, rel=1e-4)  # ε in the divisor of the norm


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_gradient_changes_nothing_on_device(make_model, value):
    model = make_model(version="7")
    opt = optimizer.make(model, TrainConfig(optimizer="adamw8bit"))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    assert not math.isfinite(opt.set_clip(1.0))
    opt.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_nan_batch_skipped(make_base, tmp_path):
    flags = poisoned(make_base, tmp_path) | {"optimizer": "adamw8bit"}
    fit(TrainConfig(**flags, proj_dir=str(tmp_path / "run"), on_nan="skip"))
    norms = [line["grad_norm"] for line in lines(tmp_path / "run")]
    assert None in norms
    assert norms[-1] is not None
    steps = {moments["step"] for moments in state_files.newest(tmp_path / "run").optimizer.values()}
    assert steps == {12 - norms.count(None)}
    with pytest.raises(UserError, match="the loss is nan"):
        fit(TrainConfig(**flags, proj_dir=str(tmp_path / "stopped")))


def test_runs_without_compiled_kernels(train, monkeypatch):
    expected = train("compiled")
    used = []
    monkeypatch.setattr(adamw, "_kernel", lambda device: used.append(device))
    losses, weights = train("reference")
    assert used
    assert losses == expected[0]
    assert same(weights, expected[1])


@pytest.mark.skipif(not compat.gloo_supports_bf16(), reason="gloo of torch 1 does not support bf16")
def test_two_ranks_take_equal_steps(two_ranks, root):
    program = root / "tests/train/two_ranks_step.py"
    assert two_ranks(program, "adamw8bit", GLOO_SOCKET_IFNAME="lo").count("equal") == 2


INVALID = [
    ({"optimizer": "adam", "release_grads": 1}, "--release_grads 1 needs --optimizer adamw8bit"),
    ({"strategy": "deepspeed_stage_2"}, "not supported with DeepSpeed|DeepSpeed 0.7.0 trains on GPUs only"),
    ({**RELEASED, "grad_clip": 1.0}, "--grad_clip 1 needs the norm of all gradients; pass --grad_clip 0"),
    ({**RELEASED, "accumulate_grad_batches": 2}, "--accumulate_grad_batches 2 adds gradients up; use 1"),
    ({**RELEASED, "on_nan": "skip"}, "use --on_nan stop, or omit --release_grads"),
]
for _strategy in DDP:
    if compat.gloo_supports_bf16():
        INVALID.append(({**RELEASED, "strategy": _strategy}, "use one device and --strategy auto"))
    else:
        INVALID.append(({"strategy": _strategy}, "gloo in this torch version does not support bf16"))


@pytest.mark.parametrize(("flags", "message"), INVALID)
def test_incompatible_flags(train, flags, message):
    with pytest.raises(UserError, match=message):
        train("run", **flags)


@pytest.mark.parametrize("version", ["4", "7"])
def test_adapters(make_base, make_data, tmp_path, version):
    """Their weights stay fp32; runs resume bit for bit; releasing gradients changes nothing."""
    base = make_base(version=version, n_embd=128, dim_ffn=128)
    flags = {**RUN, "load_model": str(base), "data_file": make_data(400), "lora_base": "nf4", "grad_clip": 0.0}
    flags |= {"lora_r": 32, "lora_parts": "att,ffn,time,ln", "use_dora": True, "lora_dropout": 0.1}

    def train(name, **changed):
        return fit(LoRAConfig(**flags | changed, proj_dir=str(tmp_path / name)))

    whole = train("whole")
    train("parts", max_steps=3)
    state = state_files.newest(tmp_path / "parts")
    assert {x.dtype for x in state.weights.values()} == {torch.float32}
    sizes = {x.dtype for moments in state.optimizer.values() for x in moments.values() if torch.is_tensor(x)}
    assert sizes == {torch.uint8, torch.float32}
    losses = [line["loss"] for line in lines(tmp_path / "whole")]
    for name, changed in (("parts", {}), ("released", RELEASED)):
        result = train(name, **changed)
        assert [line["loss"] for line in lines(tmp_path / name)] == losses
        assert same(read_tensors(result.checkpoint), read_tensors(whole.checkpoint))
    train("adam", optimizer="adam")
    assert losses == pytest.approx([line["loss"] for line in lines(tmp_path / "adam")], rel=0.01)  # six steps
    types = json.loads((tmp_path / "whole/run.json").read_text())["types"]
    assert "trained weights float32 (they are the master weights)" in types
    assert "moments 8-bit" in types


def test_not_for_fp16(monkeypatch):
    from rwkv.train import checks

    monkeypatch.setattr(checks.machine, "use_gpu", lambda accelerator: True)
    with pytest.raises(UserError, match="does not undo the scaling of gradients"):
        checks.check_adamw8bit(TrainConfig(optimizer="adamw8bit", precision="fp16"))


def test_no_cuda_graph_with_released_gradients():
    c = TrainConfig(version="7", optimizer="adamw8bit", **RELEASED)
    assert "--release_grads 1" in cuda_graph._why_not(c, on_gpu=True)
    assert cuda_graph._why_not(TrainConfig(version="7", optimizer="adamw8bit"), on_gpu=True) is None


def test_resume_with_other_optimizer(train):
    train("run", max_steps=4)
    with pytest.raises(UserError, match="it was saved with --optimizer adamw8bit, but this run has adam"):
        train("run", optimizer="adam", allow_changes=True)


def test_auto_picks_it_if_adam_does_not_fit(train, tmp_path, monkeypatch, capsys):
    """The choice is logged, and a resumed run keeps it, also where Adam would fit."""
    flags = {"optimizer": "auto", "auto": True, "micro_bsz": 1, "grad_clip": 0.0}
    sizes = checkpoint.sizes_of(train("base", max_steps=1)[1], "")
    c = TrainConfig(**{**RUN, **flags, "grad_cp": 1})
    plans = {
        name: plan_of(replace(c, **changed), sizes, False, "bf16")
        for name, changed in (
            ("adam", {}), ("narrow", {"optimizer": "adamw8bit"}), ("released", {"optimizer": "adamw8bit", "release_grads": 1}),
        )
    }  # fmt: skip
    needed = {name: round((estimate(found).total + 1) / auto.USABLE) for name, found in plans.items()}
    assert needed["released"] < needed["narrow"] < needed["adam"]

    monkeypatch.setattr(machine, "memory_of", lambda gpu, devices=1: memory)
    memory = needed["released"]
    capsys.readouterr()
    train("parts", **flags, max_steps=2)
    assert "--strategy auto --optimizer adamw8bit --release_grads 1 (with Adam" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "parts/run.json").read_text())["flags"]
    assert (recorded["optimizer"], recorded["release_grads"]) == ("adamw8bit", 1)
    memory = needed["adam"]
    losses, weights = train("parts", **flags)
    given = train("whole", **{**flags, "optimizer": "adamw8bit", "release_grads": 1, "auto": False})
    assert losses == given[0]
    assert same(weights, given[1])
    train("adam", **flags, max_steps=1)
    assert json.loads((tmp_path / "adam/run.json").read_text())["flags"]["optimizer"] == "adam"


def test_state_dict_keeps_dtypes():
    p = torch.nn.Parameter(torch.randn(5000).bfloat16())
    groups = [{"params": [p], "names": ["p"]}]
    first, second = (adamw8bit.AdamW8bit(groups, 0, lr=0.1, betas=(0.9, 0.99), eps=1e-8) for _ in range(2))
    p.grad = torch.randn(5000).bfloat16()
    first.step()
    second.load_state_dict(first.state_dict())
    for key, value in first.state[p].items():
        found = second.state[p][key]
        assert torch.equal(found, value) if torch.is_tensor(value) else found == value
        assert not torch.is_tensor(value) or found.dtype == value.dtype
