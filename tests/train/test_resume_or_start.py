"""A resumed run is bit-identical to an uninterrupted one, in losses and weights, however it was
stopped.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch

from rwkv import checkpoint, files
from rwkv.checkpoint import read_manifest, read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.train.fit import fit
from rwkv.train.resume import state_files
from tests.train.finished_run import changed
from tests.train.small_runs import assert_same_tensors, lines, wait_for_steps

FLAGS = {
    "ctx_len": 8,
    "micro_bsz": 2,
    "epoch_steps": 4,
    "epoch_count": 3,
    "random_seed": 1,
    "accelerator": "cpu",
    "lr_init": 1e-3,
}
FLAGS |= {"precision": "fp32"}
NEW = {"version": "4", "n_layer": 2, "n_embd": 16, "vocab_size": 50}
MANY = 40_000  # micro-batches of an epoch: 60,000 steps, so that a signal arrives before the end


def losses(folder):
    return [(line["step"], line["loss"], line["lr"], line["tokens"]) for line in lines(folder)]


def assert_same_run(folder, uninterrupted, name="rwkv-2.pth"):
    assert losses(folder) == losses(uninterrupted)
    assert_same_tensors(folder / name, uninterrupted / name)


def make(kind, make_base, make_data, **flags):
    """A config of full tuning or LoRA, with dropout, accumulation and warmup."""
    common = {
        **FLAGS,
        "data_file": make_data(300),
        "load_model": str(make_base()),
        "accumulate_grad_batches": 2,
        "warmup_steps": 3,
        **flags,
    }
    return (
        LoRAConfig(**{"lora_dropout": 0.2, **common}) if kind == "lora" else TrainConfig(**{"dropout": 0.1, **common})
    )


@pytest.mark.parametrize("kind", ["lora", "all"])
def test_resume_at_every_step(kind, make_base, make_data, tmp_path):
    config = make(kind, make_base, make_data, proj_dir=str(tmp_path / "uninterrupted"))
    fit(config)
    for steps in range(1, 6):  # six steps in total, two per epoch
        fit(changed(config, proj_dir=str(tmp_path / "run"), max_steps=steps))
        torch.manual_seed(99)  # as in a new process
        random.seed(99)
        np.random.seed(99)
    fit(changed(config, proj_dir=str(tmp_path / "run")))
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
    state = state_files.newest(tmp_path / "run")
    trained = read_tensors(tmp_path / "run/rwkv-2.pth").keys()
    assert state.weights.keys() == state.optimizer.keys() == trained  # trainable parameters only
    assert len(state_files.states(tmp_path / "run")) == 2


def test_resume_keeps_drawn_seed(make_data, tmp_path):
    config = TrainConfig(**FLAGS | NEW | {"random_seed": -1}, data_file=make_data(200), proj_dir=str(tmp_path / "run"))
    fit(changed(config, max_steps=5))
    fit(config)
    seed = json.loads((tmp_path / "run/run.json").read_text())["flags"]["random_seed"]
    fit(changed(config, random_seed=seed, proj_dir=str(tmp_path / "uninterrupted")))
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


def test_more_epochs(make_data, tmp_path, capsys):
    config = TrainConfig(**FLAGS | NEW, data_file=make_data(200), proj_dir=str(tmp_path / "run"))
    fit(changed(config, epoch_count=1))
    fit(config)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 13))
    printed = capsys.readouterr().out
    assert "continuing from step 4: 8 steps left" in printed
    assert "--epoch_count changed from 1 to 3, so the learning rate jumps from" in printed
    assert {path.name for path in (tmp_path / "run").glob("*.pth")} == {"rwkv-0.pth", "rwkv-2.pth"}


def flip_a_bit(path):
    """Flip a bit in the middle, in a tensor."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short])
def test_corrupt_state_falls_back(damage, make_base, make_data, tmp_path, capsys):
    config = make("all", make_base, make_data, proj_dir=str(tmp_path / "run"), save_every=1)
    fit(changed(config, max_steps=4))
    newest = state_files.states(tmp_path / "run")[0]
    damage(newest)
    fit(config)
    printed = capsys.readouterr().out
    assert f"{newest} is corrupt" in printed
    assert "continuing from step 3: " in printed
    fit(changed(config, proj_dir=str(tmp_path / "uninterrupted")))
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")
    for path in state_files.states(tmp_path / "run"):
        damage(path)
    for _ in range(2):  # as a job that restarts on failure
        with pytest.raises(
            UserError, match=r"only corrupt training states \(resume/step-.*--load_model .*rwkv-2.pth --epoch_begin 3"
        ):
            fit(config)
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


def test_changed_flags_and_data(make_base, make_data, tmp_path):
    config = make("lora", make_base, make_data, proj_dir=str(tmp_path / "run"))
    fit(changed(config, max_steps=2))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"--lr_init: 0.001 → 0.1\n  --lora_alpha: 32 → 16\n"):
        fit(changed(config, lr_init=0.1, lora_alpha=16))
    with pytest.raises(UserError, match="samples in a step: 4 → 8"):
        fit(changed(config, micro_bsz=4))
    other = make_data(301, name="other")
    with pytest.raises(UserError, match=r"data \(SHA-256, bytes\)"):
        fit(changed(config, data_file=other))
    with pytest.raises(UserError, match=r"base model \(SHA-256\)"):
        fit(changed(config, load_model=str(make_base("other.pth", seed=5))))
    assert {path: path.read_bytes() for path in before} == before
    shutil.copy(tmp_path / "data.bin", tmp_path / "moved.bin")
    shutil.copy(tmp_path / "data.idx", tmp_path / "moved.idx")
    fit(changed(config, data_file=str(tmp_path / "moved"), val_every=0, max_steps=3))  # same content, another path
    fit(changed(config, lr_init=0.1, allow_changes=True, max_steps=4))
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["changed"] == [{"after_step": 3, "changes": ["--lr_init: 0.001 → 0.1"]}]


def test_resume_with_other_micro_batch(make_base, make_data, tmp_path):
    config = make("all", make_base, make_data, magic_prime=-1, dropout=0.0)
    other = {"micro_bsz": 4, "accumulate_grad_batches": 1, "epoch_steps": 2}
    fit(changed(config, proj_dir=str(tmp_path / "uninterrupted")))
    fit(changed(config, proj_dir=str(tmp_path / "run"), max_steps=3))
    fit(changed(config, proj_dir=str(tmp_path / "run"), **other))
    ours, theirs = losses(tmp_path / "run"), losses(tmp_path / "uninterrupted")
    assert [line[2:] for line in ours] == [line[2:] for line in theirs]
    # fp32, different summation order
    assert [line[1] for line in ours] == pytest.approx([line[1] for line in theirs], rel=1e-5)


def test_disk_full_keeps_last_state(make_base, make_data, tmp_path, monkeypatch):
    config = make("all", make_base, make_data, proj_dir=str(tmp_path / "run"), save_every=1)
    reserve = files.reserve

    def full(file, size):
        if len(state_files.states(tmp_path / "run")) == 2:
            raise OSError(28, "No space left on device")
        reserve(file, size)

    monkeypatch.setattr(checkpoint, "reserve", full)
    with pytest.raises(UserError, match=r"rwkv-0.pth: no space left on the device; free some space .* run again"):
        fit(config)
    assert [path.name for path in state_files.states(tmp_path / "run")] == ["step-2.pt", "step-1.pt"]
    assert not (tmp_path / "run/rwkv-0.pth").exists()
    monkeypatch.undo()
    fit(config)
    fit(changed(config, proj_dir=str(tmp_path / "uninterrupted")))
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


def test_disk_full_for_metrics(start, make_base, make_data, tmp_path, root):
    config = make("all", make_base, make_data, proj_dir=str(tmp_path / "run"), epoch_steps=400)
    script, *arguments = command(config, save_every=1000, epoch_save=1000)
    limited = tmp_path / "limited.py"
    limited.write_text(
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        f"runpy.run_path({str(root / 'scripts' / script)!r}, run_name='__main__')"
    )
    result = start(limited, *arguments).result()
    assert result.returncode == 1
    last = result.stderr.rstrip().splitlines()[-1]
    assert re.fullmatch(
        r"error: .*/(metrics.jsonl|train_log.txt): the file exceeds the maximum file size; free some space .*continues from its last state",
        last,
    )


def command(config, **flags):
    """The script and its arguments."""
    given = {key: value for key, value in {**vars(config), **flags}.items() if value != getattr(type(config)(), key)}
    script = "lora.py" if isinstance(config, LoRAConfig) else "finetune.py"
    return [script, *(str(word) for key, value in given.items() for word in (f"--{key}", value))]


def run_until(process, folder, step):
    """Wait until a run has taken `step` steps; returns its process."""
    wait_for_steps(folder, step, process)
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_resume_after_signal(number, status, start, make_base, make_data, tmp_path):
    config = make("lora", make_base, make_data, proj_dir=str(tmp_path / "run"), epoch_steps=MANY, save_every=5)
    process = run_until(start(*command(config)), tmp_path / "run", 8)
    process.send_signal(number)
    printed, errors = process.communicate()
    assert process.returncode == status, errors
    last = lines(tmp_path / "run")[-1]["step"]
    if number != signal.SIGKILL:
        assert f"stopped at step {last:,} of 60,000 and saved" in printed
        assert (
            state_files.newest(tmp_path / "run").step == last == read_manifest(tmp_path / "run/rwkv-final.pth")["step"]
        )
    fit(changed(config, max_steps=last + 5))
    fit(changed(config, proj_dir=str(tmp_path / "uninterrupted"), max_steps=last + 5))
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted", "rwkv-final.pth")
    assert not list((tmp_path / "run").rglob(".*.tmp"))


@pytest.mark.parametrize("kind", ["lora", "all"])
def test_second_process_in_folder(kind, start, make_base, make_data, tmp_path):
    config = make(kind, make_base, make_data, proj_dir=str(tmp_path / "run"), epoch_steps=MANY, save_every=5)
    process = run_until(start(*command(config)), tmp_path / "run", 8)
    process.send_signal(signal.SIGSTOP)  # it holds the folder, however long the others take
    try:
        flags = ({}, {"overwrite": True}, {"allow_changes": True, "lr_init": 1e-4})
        for other in [start(*command(config, **more)) for more in flags]:
            result = other.result()
            assert result.returncode == 1
            assert re.match(
                rf"error: .*/run: in use by process {process.pid} on .*, or choose another --proj_dir\n$", result.stderr
            ), result.stderr
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = lines(tmp_path / "run")[-1]["step"]
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, last + 1))
    fit(changed(config, max_steps=last + 5))  # despite files of the killed process
    fit(changed(config, proj_dir=str(tmp_path / "uninterrupted"), max_steps=last + 5))
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted", "rwkv-final.pth")
    assert not (tmp_path / "run/.lock").exists()


def test_resume_two_ranks(start, two_ranks, make_base, make_data, tmp_path):
    config = make("lora", make_base, make_data, devices=2, micro_bsz=1, epoch_steps=MANY, save_every=3)
    config = changed(config, precision="bf16")
    # SIGTERM to one rank ends both after the same step.
    process = run_until(start(*command(config, proj_dir=tmp_path / "run")), tmp_path / "run", 4)
    child = int(
        subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()[0]
    )
    os.kill(child, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143, errors
    last = lines(tmp_path / "run")[-1]["step"]
    for folder in ("run", "uninterrupted"):
        two_ranks(*command(config, proj_dir=tmp_path / folder, max_steps=last + 5))
    assert len(state_files.newest(tmp_path / "run").rng) == 2
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted", "rwkv-final.pth")
