"""--auto from the command line to the trainer, on simulated GPUs."""

import importlib
from dataclasses import replace

import pytest
import torch

from rwkv import compat
from rwkv.cli import parse
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.memory import auto, machine
from rwkv.memory.estimate import estimate
from rwkv.memory.plan import Plan, plan_of
from rwkv.models.v4 import Sizes
from rwkv.models.version import VERSIONS, published
from rwkv.train import resolve
from rwkv.train.callbacks.memory import MemoryMonitor

SIZES = Sizes(2, 64, 500, 64, 256)
HOST = 64 * 10**9


class Resolved(Exception):
    """Raised in place of building the model, as the run would need GPUs."""


@pytest.fixture
def resolved_flags(monkeypatch, make_data, tmp_path):
    """Run a command line on simulated GPUs of `memory` bytes each; returns the resolved flags."""
    fit = importlib.import_module("rwkv.train.fit")

    def run(kind, memory: int, *flags: str, host: int = HOST, version: str = "4"):
        monkeypatch.setattr(machine, "use_gpu", lambda accelerator: True)
        monkeypatch.setattr(machine, "memory_of", lambda gpu, devices=1: memory if gpu else host)
        monkeypatch.setattr(compat, "why_deepspeed_unavailable", lambda on_gpu: None)

        def build(run):
            raise Resolved(run.flags)

        monkeypatch.setattr(fit.setup, "build", build)
        sizes = ["--version", version, "--n_layer", "2", "--n_embd", "64", "--vocab_size", "500"]
        common = [
            "--data_file",
            make_data(3000, vocab=500),
            "--proj_dir",
            str(tmp_path / "run"),
            "--ctx_len",
            "128",
            "--micro_bsz",
            "4",
        ]
        common += ["--epoch_steps", "3", "--epoch_count", "1", "--precision", "bf16", "--random_seed", "1", "--auto"]
        with pytest.raises(Resolved) as caught:
            fit.fit(parse(kind, "", [*sizes, *common, *flags]))
        return caught.value.args[0]

    return run


def plan(**changed) -> Plan:
    return replace(Plan(SIZES, lora=False, ctx_len=128, micro_bsz=4), **changed)


def memory_for(p: Plan) -> int:
    return round((estimate(p).total + 1) / auto.USABLE)


STEPS = [  # devices, the plan that just fits, and the expected flags
    (1, {}, (4, 1, 0, "auto")),
    (1, {"micro_bsz": 2, "accumulate": 2}, (2, 2, 0, "auto")),
    (1, {"micro_bsz": 1, "accumulate": 4, "grad_cp": True}, (1, 4, 1, "auto")),
    (
        1,
        {"micro_bsz": 1, "accumulate": 4, "grad_cp": True, "strategy": "deepspeed_stage_2_offload"},
        (1, 4, 1, "deepspeed_stage_2_offload"),
    ),
    (8, {}, (4, 1, 0, "auto")),
    (
        8,
        {"micro_bsz": 1, "accumulate": 4, "grad_cp": True, "strategy": "deepspeed_stage_2"},
        (1, 4, 1, "deepspeed_stage_2"),
    ),
]


@pytest.mark.parametrize(("devices", "fitting", "expected"), STEPS)
def test_auto_picks_cheapest_flags(resolved_flags, capsys, devices, fitting, expected):
    target = plan(devices=devices, per_node=devices, **fitting)
    config = resolved_flags(TrainConfig, memory_for(target), "--devices", str(devices), "--optimizer", "adam")
    chosen = plan_of(config, SIZES, True, "bf16")
    assert estimate(chosen).total <= estimate(target).total
    assert (config.micro_bsz, config.accumulate_grad_batches, config.grad_cp, config.strategy) == expected
    assert config.micro_bsz * config.accumulate_grad_batches == 4
    assert config.epoch_steps == 3 * 4 // config.micro_bsz
    printed = capsys.readouterr().out
    assert (
        f"auto:  --micro_bsz {expected[0]} --accumulate_grad_batches {expected[1]} --grad_cp {expected[2]} --strategy {expected[3]}: "
        in printed
    )


@pytest.mark.parametrize("number", ["5.2", "6", "7"])
def test_auto_of_later_versions(resolved_flags, number):
    sizes = VERSIONS[number].Sizes(2, 64, 500)
    for fitting in ({}, {"micro_bsz": 2, "accumulate": 2}, {"micro_bsz": 1, "accumulate": 4, "grad_cp": True}):
        target = plan(sizes=sizes, **fitting)
        config = resolved_flags(TrainConfig, memory_for(target), "--optimizer", "adam", version=number)
        found = plan_of(config, sizes, True, "bf16")
        assert (found.micro_bsz, found.accumulate, found.grad_cp) == (
            target.micro_bsz,
            target.accumulate,
            target.grad_cp,
        )


def chosen(monkeypatch, target: Plan, kind=TrainConfig, usable=lambda c: True, quantise=False, **flags):
    """The flags that --auto chooses on GPUs where `target` just fits, and what it prints."""
    monkeypatch.setattr(machine, "memory_of", lambda gpu, devices=1: memory_for(target) if gpu else 10**12)
    c = kind(**{"ctx_len": 1024, "micro_bsz": 1, "grad_cp": 1, "precision": "bf16", **flags})
    return auto.choose(c, plan_of(c, published("1.5b"), True, c.precision), usable, quantise)


BIG = Plan(published("1.5b"), lora=False, ctx_len=1024, micro_bsz=1, grad_cp=True)
NARROW = replace(BIG, optimizer="adamw8bit")


def test_auto_picks_adamw8bit_before_offloading(monkeypatch):
    c, said = chosen(monkeypatch, NARROW)
    assert (c.optimizer, c.release_grads, c.strategy) == ("adamw8bit", 0, "auto")
    assert (
        "--optimizer adamw8bit (with Adam in fp32 even --micro_bsz 1 --grad_cp 1 does not fit; --optimizer adam" in said
    )
    c, said = chosen(monkeypatch, BIG)
    assert (c.optimizer, c.strategy) == ("adam", "auto")
    assert "adamw8bit" not in said
    offloaded = replace(BIG, strategy="deepspeed_stage_2_offload")
    for target, flags in ((offloaded, {}), (NARROW, {"optimizer": "adam"}), (NARROW, {"precision": "fp16"})):
        c, said = chosen(monkeypatch, target, **flags)
        assert (c.optimizer, c.strategy) == ("adam", "deepspeed_stage_2_offload")
        assert "adamw8bit" not in said


def test_auto_releases_gradients_only_without_clipping(monkeypatch, make_data):
    target = replace(NARROW, release_grads=True)
    usable = importlib.import_module("rwkv.train.resolve")._usable
    monkeypatch.setattr(compat, "why_deepspeed_unavailable", lambda on_gpu: None)
    for flags, released in (
        ({"grad_clip": 0.0}, 1),
        ({}, 0),
        ({"grad_clip": 0.0, "cuda_graph": "on"}, 0),
        ({"grad_clip": 0.0, "accumulate_grad_batches": 2}, 0),
    ):
        c, said = chosen(monkeypatch, target, usable=usable, data_file=make_data(300), **flags)
        assert (c.release_grads, c.optimizer == "adamw8bit") == (released, bool(released))
        assert ("--release_grads 1" in said) == bool(released)


def test_auto_does_not_accumulate_released_gradients(monkeypatch, make_data):
    """A smaller micro_bsz would need accumulation, which --release_grads excludes."""
    usable = importlib.import_module("rwkv.train.resolve")._usable
    flags = {"optimizer": "adamw8bit", "release_grads": 1, "grad_clip": 0.0, "micro_bsz": 8, "grad_cp": 0}
    flags["data_file"] = make_data(300)
    target = replace(NARROW, release_grads=True, micro_bsz=8)
    c, _ = chosen(monkeypatch, target, usable=usable, **flags)
    assert (c.micro_bsz, c.grad_cp) == (8, 1)
    with pytest.raises(UserError, match="--auto: nothing fits"):
        chosen(monkeypatch, replace(target, micro_bsz=1), usable=usable, **flags)


def test_auto_shards_before_it_narrows(monkeypatch):
    several = {"devices": 8, "per_node": 8}
    for name in ("deepspeed_stage_2", "deepspeed_stage_3"):
        c, _ = chosen(monkeypatch, replace(BIG, strategy=name, **several), devices=8)
        assert (c.optimizer, c.strategy) == ("adam", name)
    c, _ = chosen(monkeypatch, replace(NARROW, **several), usable=lambda c: c.strategy == "auto", devices=8)
    assert (c.optimizer, c.strategy) == ("adamw8bit", "auto")


def test_auto_of_lora_narrows_the_optimizer_last(monkeypatch):
    """After nf4, or alone if a quantised base is given; not against --optimizer adam."""
    adapted = replace(BIG, lora=True)
    both = replace(adapted, base="nf4", optimizer="adamw8bit")
    for target, flags, expected in (
        (replace(adapted, base="nf4"), {}, ("nf4", "adam")),
        (both, {}, ("nf4", "adamw8bit")),
        (both, {"lora_base": "nf4"}, ("nf4", "adamw8bit")),
    ):
        c, said = chosen(monkeypatch, target, LoRAConfig, quantise=not flags, **flags)
        assert (c.lora_base, c.optimizer, c.strategy) == (*expected, "auto")
        assert ("--optimizer adamw8bit (with Adam in fp32" in said) == (expected[1] == "adamw8bit")
        assert ("--lora_base nf4" in said) == (not flags)
    with pytest.raises(UserError, match="--auto: nothing fits .* --optimizer adamw8bit"):
        chosen(monkeypatch, both, LoRAConfig, lora_base="nf4", optimizer="adam", usable=lambda c: c.strategy == "auto")


def test_auto_for_lora(resolved_flags, capsys):
    target = plan(lora=True, micro_bsz=1, accumulate=4, devices=8, per_node=8)
    config = resolved_flags(LoRAConfig, memory_for(target), "--devices", "8", "--lora", "1")
    assert (config.micro_bsz, config.grad_cp, config.strategy) == (1, 0, "auto")
    assert f"of {auto.USABLE * memory_for(target) / 1e9:.2f} GB" in capsys.readouterr().out


def test_auto_respects_flags_that_exclude_a_strategy(make_data, monkeypatch):
    """With ZeRO-3 no process has the weights to write samples with."""
    monkeypatch.setattr(compat, "why_deepspeed_unavailable", lambda on_gpu: None)
    c = TrainConfig(data_file=make_data(3000), version="4", n_layer=2, n_embd=64, devices=8)
    for name, samples, usable in (("3", 0, True), ("3", 5, False), ("2_offload", 5, True)):
        assert resolve._usable(replace(c, strategy=f"deepspeed_stage_{name}", sample_every=samples)) == usable


def test_auto_respects_host_memory_and_flags(resolved_flags, monkeypatch):
    offloaded = memory_for(plan(micro_bsz=1, accumulate=4, grad_cp=True, strategy="deepspeed_stage_2_offload"))
    with pytest.raises(
        UserError,
        match=r"--strategy deepspeed_stage_2_offload would fit, but needs [\d.]+ GB of host memory; 0\.1 GB are usable\. Use LoRA",
    ):
        resolved_flags(TrainConfig, offloaded, "--optimizer", "adam", host=10**8)
    factored = memory_for(plan(micro_bsz=1, accumulate=4, grad_cp=True, optimizer="adafactor"))
    assert resolved_flags(TrainConfig, factored, "--optimizer", "adafactor").strategy == "auto"
    # only DeepSpeed would fit, which supports neither Adafactor nor skipping steps
    with pytest.raises(UserError, match="--auto: nothing fits"):
        resolved_flags(TrainConfig, offloaded, "--optimizer", "adafactor")
    with pytest.raises(UserError, match="--auto: nothing fits"):
        resolved_flags(TrainConfig, offloaded, "--optimizer", "adam", "--on_nan", "skip")


def test_cuda_out_of_memory_message(monkeypatch):
    total, used = 24 * 10**9, 23 * 10**9
    monkeypatch.setattr(machine, "memory_of", lambda gpu, devices=1: total)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: used)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    target = plan(sizes=published("1.5b"), ctx_len=1024, micro_bsz=1)
    monitor = MemoryMonitor(target, 0)
    monitor._device = torch.device("cuda")
    with pytest.raises(UserError) as caught, monitor.explain_errors():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    message = str(caught.value)
    assert f"{monitor.expected() / 1e9:.2f} GB per device were predicted; 23.00 GB of 24.00 GB were in use" in message
    assert "The cheapest change that fits: --grad_cp 1, --strategy deepspeed_stage_2_offload (" in message
    with pytest.raises(RuntimeError, match="shapes"), monitor.explain_errors():  # other errors are not changed
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_unknown_gpu_memory(resolved_flags, capsys, monkeypatch):
    config = resolved_flags(TrainConfig, 0, "--grad_cp", "1")
    assert (config.micro_bsz, config.accumulate_grad_batches, config.grad_cp, config.strategy) == (4, 1, 1, "auto")
    printed = capsys.readouterr().out
    assert "auto:  the memory size of this device is unknown; flags unchanged" in printed
    assert "GB usable" not in printed
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10**9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monitor = MemoryMonitor(plan(sizes=published("1.5b"), ctx_len=1024, micro_bsz=1), 0)
    monitor._device = torch.device("cuda")
    with (
        pytest.raises(UserError, match=r"1\.00 GB were in use when an allocation failed\. ") as caught,
        monitor.explain_errors(),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "0.00 GB" not in str(caught.value)
