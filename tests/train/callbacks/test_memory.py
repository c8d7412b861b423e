"""Memory of real runs: measured, predicted, chosen by --auto, and reported when it runs out."""

import json
import re
from dataclasses import replace

import pytest
import torch

from rwkv import checkpoint
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.memory import auto, machine
from rwkv.memory.estimate import estimate
from rwkv.memory.parts import total
from rwkv.memory.plan import plan_of
from rwkv.models.v4 import Sizes
from rwkv.train.callbacks.memory import out_of_memory
from rwkv.train.fit import fit

FLAGS = {
    "ctx_len": 8,
    "micro_bsz": 4,
    "epoch_steps": 3,
    "epoch_count": 1,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "fp32",
}
# 21 million parameters, and about as much memory for a batch: large compared with the process, at
# 1 s per step.
MEDIUM = {
    "n_layer": 6,
    "version": "4",
    "n_embd": 384,
    "vocab_size": 8192,
    "ctx_len": 512,
    "micro_bsz": 4,
    "epoch_steps": 2,
    "epoch_count": 1,
    "random_seed": 1,
}


def words(flags):
    return [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]


def test_peak_memory_per_phase(make_data, tmp_path):
    fit(
        TrainConfig(
            **FLAGS,
            version="4",
            n_layer=2,
            n_embd=16,
            vocab_size=50,
            data_file=make_data(200),
            proj_dir=str(tmp_path / "run"),
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert set(line["peak_mib"]) == {"forward", "backward", "optimizer"}
        assert all(50 < value <= line["rss_peak_mib"] for value in line["peak_mib"].values())


SHAPES = {
    "medium": {},
    "grad_cp": {"grad_cp": 1},
    # as `make lora` pretrains
    "demo": {
        "version": "7",
        "n_layer": 2,
        "n_embd": 128,
        "vocab_size": 65536,
        "ctx_len": 128,
        "micro_bsz": 3,
        "epoch_steps": 3,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_predicted_resident_memory(make_data, tmp_path, script, shape):
    flags = MEDIUM | {
        "data_file": make_data(20000, vocab=8192),
        "proj_dir": tmp_path / "run",
        "accelerator": "cpu",
        "precision": "fp32",
    }
    flags |= SHAPES[shape]
    # one of them in a new Python, as the libraries are a part of the memory
    result = script("pretrain.py", *words(flags), fresh=shape == "demo")
    predicted, measured = map(
        float, re.search(r"memory: ([\d.]+) GB per device predicted, ([\d.]+) GB measured", result.stdout).groups()
    )
    # tests/memory/test_estimate.py checks the allocator's bytes to a few percent; process and heap
    # add to them. Alone it is less than 1.25; beside other processes 1.25 has been seen.
    assert 0.85 * predicted < measured < 1.35 * predicted, result.stdout


def test_out_of_memory_message(make_data, tmp_path, root, start):
    # A real limit on the address space: that of the process after imports plus 1.5 GB, for a batch
    # that needs more.
    flags = MEDIUM | {
        "micro_bsz": 64,
        "data_file": make_data(50000, vocab=8192),
        "proj_dir": tmp_path / "run",
        "accelerator": "cpu",
    }
    flags |= {"precision": "fp32"}
    (tmp_path / "limited.py").write_text("""
import resource, runpy, sys
import rwkv.train.fit
from rwkv.memory import machine
resource.setrlimit(resource.RLIMIT_AS, [machine._status("VmSize") + (1500 << 20)] * 2)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    result = start(tmp_path / "limited.py", root / "scripts/pretrain.py", *words(flags)).result()
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "error: out of memory." in result.stderr
    assert "GB per device were predicted; " in result.stderr
    assert "--micro_bsz" in result.stderr.split("The cheapest change that fits:")[1]


def test_recognises_torch_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_auto_keeps_step(make_base, make_data, tmp_path, monkeypatch, capsys):
    flags = FLAGS | {
        "load_model": str(make_base()),
        "data_file": make_data(400),
        "epoch_steps": 4,
        "lr_init": 1e-3,
        "lora_dropout": 0,
    }
    flags |= {"magic_prime": -1}
    fit(LoRAConfig(**flags, proj_dir=str(tmp_path / "plain")))
    plan = plan_of(LoRAConfig(**flags), Sizes(2, 16, 50, 16, 64), False, "fp32")
    halved = estimate(replace(plan, micro_bsz=2, accumulate=2)).total
    monkeypatch.setattr(machine, "memory_of", lambda gpu, devices=1: (halved + 1) / auto.USABLE)
    capsys.readouterr()
    fit(LoRAConfig(**flags, proj_dir=str(tmp_path / "auto"), auto=True))
    assert "auto:  --micro_bsz 2 --accumulate_grad_batches 2 --grad_cp 0" in capsys.readouterr().out
    plain, chosen = (checkpoint.read_tensors(tmp_path / name / "rwkv-0.pth") for name in ("plain", "auto"))
    for key in plain:
        # different summation order, then Adam
        torch.testing.assert_close(plain[key], chosen[key], rtol=1e-4, atol=1e-5, msg=key)


def test_auto_nothing_fits(make_data, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory_of", lambda gpu, devices=1: 1 << 20)
    with pytest.raises(UserError, match=r"--auto: nothing fits into 0\.00 GB"):
        fit(
            TrainConfig(
                **FLAGS,
                n_layer=2,
                version="4",
                n_embd=16,
                vocab_size=50,
                data_file=make_data(200),
                proj_dir=str(tmp_path / "run"),
                auto=True,
            )
        )


def test_adafactor_learns_with_factored_state(make_data, tmp_path):
    from rwkv.models import RWKV
    from rwkv.train.loop import optimizer

    config = TrainConfig(
        **FLAGS | {"epoch_steps": 40},
        n_layer=2,
        version="4",
        n_embd=16,
        vocab_size=50,
        optimizer="adafactor",
        lr_init=1e-2,
        lr_final=1e-2,
    )
    config.data_file, config.proj_dir = make_data(60), str(tmp_path / "run")
    result = fit(config)
    assert result.last_loss < 0.7 * result.first_loss
    model = RWKV(Sizes(2, 16, 50, 16, 64))
    adafactor = optimizer.make(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adafactor.step()
    state_bytes = sum(
        x.numel() * x.element_size()
        for state in adafactor.state.values()
        for x in state.values()
        if torch.is_tensor(x) and x.dim()
    )
    plan = plan_of(config, model.sizes, False, "fp32")
    mixes = 4 * 2 * 5  # rows of one element of the [1, 1, D] parameters, not in the prediction
    assert state_bytes == estimate(plan).device["optimizer"] + mixes
    assert state_bytes < 0.2 * 8 * total(model.sizes)


def test_no_adafactor_with_deepspeed(make_data, tmp_path, monkeypatch):
    from rwkv.train import checks
    from rwkv.train.runtime import strategy

    monkeypatch.setattr(strategy, "check", lambda c: None)  # it may reject DeepSpeed on this machine before
    with pytest.raises(UserError, match="--optimizer adafactor with --strategy deepspeed_stage_2"):
        checks.check(
            TrainConfig(**FLAGS, data_file=make_data(200), optimizer="adafactor", strategy="deepspeed_stage_2")
        )
