"""A run follows its folder when it is renamed during training, and ends with an error when it is
deleted.
"""

import contextlib
import json
import os
import shutil

import pytest

from rwkv.checkpoint import read_tensors
from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.train.fit import fit
from rwkv.train.loop.module import TrainingModule
from rwkv.train.resume import state_files
from rwkv.train.resume.tracked_folder import TrackedFolder

FLAGS = {
    "n_layer": 1,
    "version": "4",
    "n_embd": 8,
    "vocab_size": 50,
    "ctx_len": 8,
    "micro_bsz": 1,
    "epoch_steps": 6,
    "epoch_count": 2,
    "random_seed": 1,
}


@pytest.fixture
def after_step(monkeypatch):
    """Call a function after a step of the run."""

    def plan(step, act):
        original = TrainingModule.on_train_batch_end

        def hook(self, *arguments):
            original(self, *arguments)
            if self.step == step:
                act()

        monkeypatch.setattr(TrainingModule, "on_train_batch_end", hook)

    return plan


@pytest.mark.parametrize("replaced", [False, True], ids=["renamed", "renamed and replaced by another folder"])
def test_renamed_folder_is_followed(make_data, tmp_path, after_step, capsys, monkeypatch, replaced):
    config = TrainConfig(
        **FLAGS, accelerator="cpu", data_file=make_data(200), proj_dir=str(tmp_path / "run"), save_every=2, epoch_save=1
    )

    def rename():
        os.rename(tmp_path / "run", tmp_path / "新 run")
        if replaced:
            (tmp_path / "run").mkdir()

    after_step(3, rename)
    result = fit(config)
    assert result.checkpoint == tmp_path / "新 run/rwkv-1.pth"
    said = capsys.readouterr().out
    assert f"{tmp_path / 'run'} is now {tmp_path / '新 run'}; the run continues there" in said
    assert f"Pass --proj_dir '{tmp_path}/新 run' to resume it later" in said
    assert not list((tmp_path / "run").glob("*"))
    monkeypatch.undo()
    fit(TrainConfig(**vars(config) | {"proj_dir": str(tmp_path / "uninterrupted")}))
    ours, theirs = (
        [json.loads(x)["loss"] for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("新 run", "uninterrupted")
    )
    assert ours == theirs
    assert {x.name for x in (tmp_path / "新 run").glob("[!.]*")} == {
        x.name for x in (tmp_path / "uninterrupted").glob("[!.]*")
    }
    assert state_files.newest(tmp_path / "新 run").step == 12
    assert fit(TrainConfig(**vars(config) | {"proj_dir": str(tmp_path / "新 run"), "epoch_count": 3})).steps == 18


def test_deleted_folder_ends_run(make_data, tmp_path, after_step):
    config = TrainConfig(
        **FLAGS, accelerator="cpu", data_file=make_data(200), proj_dir=str(tmp_path / "run"), save_every=2
    )
    after_step(3, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(UserError, match="run was deleted during the run"):
        fit(config)
    assert not (tmp_path / "run").exists()


def opened(folder):
    """Number of this process's descriptors of a folder. (Garbage collection may close others.)"""
    found = 0
    for link in os.scandir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # scandir's own, or closed by another thread
            found += os.readlink(link) == str(folder)
    return found


def test_unchanged_folder(tmp_path):
    with TrackedFolder(tmp_path) as tracked:
        assert tracked.path() == tmp_path
        assert opened(tmp_path) == 1
    assert opened(tmp_path) == 0
    assert tracked.path() == tmp_path


def test_checkpoint_in_renamed_folder(make_data, tmp_path, after_step):
    config = TrainConfig(**FLAGS, accelerator="cpu", data_file=make_data(200), proj_dir=str(tmp_path / "run"))
    after_step(6, lambda: os.rename(tmp_path / "run", tmp_path / "moved"))
    fit(config)
    assert read_tensors(tmp_path / "moved/rwkv-0.pth")
