"""A run ends before saving if a memory-mapped input was changed in place; replacing the file has no
effect.
"""

import os

import pytest
import torch

from rwkv import checkpoint
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.train.fit import fit
from rwkv.train.loop import module
from rwkv.train.resume import state_files
from tests.train.small_runs import losses

FLAGS = {
    "ctx_len": 8,
    "micro_bsz": 2,
    "epoch_steps": 12,
    "epoch_count": 1,
    "save_every": 4,
    "random_seed": 1,
    "accelerator": "cpu",
    "magic_prime": -1,
}


@pytest.fixture
def after(monkeypatch):
    """Call a function once, after a step of the run."""

    def plan(step, do):
        def hook(self, *arguments):
            if self.step == step and not calls:
                calls.append(do())
            return before(self, *arguments)

        calls, before = [], module.TrainingModule.training_step
        monkeypatch.setattr(module.TrainingModule, "training_step", hook)

    return plan


@pytest.fixture
def between(monkeypatch):
    """Call a function once, between two steps of the run."""

    def plan(step, do):
        def noted(self, *arguments):
            before(self, *arguments)
            if self.step == step and not done:
                done.append(do())

        done, before = [], module.TrainingModule.on_train_batch_end
        monkeypatch.setattr(module.TrainingModule, "on_train_batch_end", noted)

    return plan


def overwrite(path, at, content):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("which", ["base.pth", "data.bin", "data.idx", "data_mask.bin"])
def test_input_changed_in_place_ends_run(which, after, make_base, make_data, tmp_path):
    data, path = make_data(200), tmp_path / which
    (tmp_path / "data_mask.bin").write_bytes(bytes([1, 1, 0, 1] * 50))
    config = {**FLAGS, "load_model": str(make_base()), "data_file": data}
    good = path.read_bytes()
    at = len(good) // 2
    after(6, lambda: overwrite(path, at, bytes([good[at] ^ 1])))
    with pytest.raises(UserError, match=rf"{which}: was changed in place during the run.*the same command"):
        fit(LoRAConfig(**config, proj_dir=str(tmp_path / "run")))
    assert [state.name for state in state_files.states(tmp_path / "run")] == ["step-4.pt"]
    assert not list((tmp_path / "run").glob("rwkv-*"))
    path.write_bytes(good)
    fit(LoRAConfig(**config, proj_dir=str(tmp_path / "run")))
    fit(LoRAConfig(**config, proj_dir=str(tmp_path / "uninterrupted")))
    assert losses(tmp_path / "run") == losses(tmp_path / "uninterrupted")


@pytest.mark.parametrize("which", ["base.pth", "data.bin", "data.idx", "data_mask.bin"])
def test_truncated_input_is_no_bus_error(which, between, make_base, make_data, tmp_path):
    """An access to a mapped page beyond the end of the file would kill this process."""
    data = make_data(200)
    (tmp_path / "data_mask.bin").write_bytes(bytes([1, 1, 0, 1] * 50))
    config = {**FLAGS, "load_model": str(make_base()), "data_file": data, "doc_reset": 1, "precision": "fp32"}
    between(6, lambda: os.truncate(tmp_path / which, 0))
    with pytest.raises(UserError, match=rf"{which}: was changed in place during the run.*the same command"):
        fit(LoRAConfig(**config, proj_dir=str(tmp_path / "run")))
    assert [state.name for state in state_files.states(tmp_path / "run")] == ["step-4.pt"]


def test_invalid_id_after_change(after, make_base, make_data, tmp_path):
    data = make_data(200)
    after(2, lambda: overwrite(tmp_path / "data.bin", 0, b"\xff" * 400))
    with pytest.raises(UserError, match="data.bin: was changed in place"):
        fit(LoRAConfig(**FLAGS, load_model=str(make_base()), data_file=data, proj_dir=str(tmp_path / "run")))


def test_harmless_input_changes(after, make_base, make_data, make_model, tmp_path):
    data, base = make_data(200), make_base()

    def change():
        os.utime(tmp_path / "data.bin", ns=(1, 1))
        torch.save({}, tmp_path / "new.pth")
        os.replace(tmp_path / "new.pth", base)

    after(6, change)
    config = {**FLAGS, "load_model": str(base), "data_file": data}
    fit(LoRAConfig(**config, proj_dir=str(tmp_path / "run")))
    assert len(losses(tmp_path / "run")) == 12
    checkpoint.save_model(base, make_model(), {})
    after(6, lambda: overwrite(base, 3000, b"\0" * 8))
    fit(TrainConfig(**config, proj_dir=str(tmp_path / "full")))  # all parameters train: the base is no longer read
    assert len(losses(tmp_path / "full")) == 12
