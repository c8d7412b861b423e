"""--keep_best and --patience: which checkpoint is kept, where a run stops, and the same after
resuming.
"""

import dataclasses
import json
import shutil

import pytest
import torch

from rwkv.checkpoint import read_manifest, read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.train.fit import fit
from tests.train.small_runs import SMALL, lines

# a large learning rate, so that the validation loss falls, then rises
FLAGS = {"val_split": 0.3, "val_every": 1, "lr_init": 0.1, "lr_final": 0.1, "keep_best": True, "epoch_count": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from rwkv.data.binidx_writer import writer

    prefix = tmp_path_factory.mktemp("data") / "d"
    with writer(prefix) as out:
        for i in range(40):
            out.add([(i * j * j + j) % 50 for j in range(12)])
    return str(prefix)


@pytest.fixture(scope="module")
def config(data, tmp_path_factory):
    return TrainConfig(**SMALL | FLAGS, data_file=data, proj_dir=str(tmp_path_factory.mktemp("run") / "whole"))


@pytest.fixture(scope="module")
def whole(config):
    fit(config)
    return config.folder


def validations(folder):
    return [(line["step"], line["val_loss"]) for line in lines(folder) if line.get("val_loss") is not None]


def in_folder(config, folder, **flags):
    return dataclasses.replace(config, proj_dir=str(folder), **flags)


def assert_same_best(ours, theirs):
    keys = ("step", "val_loss", "validation_set")
    found = [{key: read_manifest(folder / "rwkv-best.pth")[key] for key in keys} for folder in (ours, theirs)]
    assert found[0] == found[1]
    a, b = (read_tensors(folder / "rwkv-best.pth") for folder in (ours, theirs))
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_best_is_the_checkpoint_of_the_lowest_loss(whole, config, tmp_path, capsys):
    step, loss = min(validations(whole), key=lambda pair: pair[1])
    last = validations(whole)[-1][0]
    assert 1 < step < last  # neither the first nor the last checkpoint
    manifest = read_manifest(whole / "rwkv-best.pth")
    assert (manifest["step"], manifest["val_loss"], manifest["kind"]) == (step, loss, "model")
    # its weights are those of a run that ends there
    short = fit(in_folder(config, tmp_path / "short", max_steps=step)).checkpoint
    ours, theirs = read_tensors(whole / "rwkv-best.pth"), read_tensors(short)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert f"best:  validation loss {loss:.3f} at step {step}" in capsys.readouterr().out


def stop_of(validations, patience):
    """The step at which a run with this patience stops, by a plain loop; None if it does not."""
    best, since = float("inf"), 0
    for step, loss in validations:
        best, since = (loss, 0) if loss < best else (best, since + 1)
        if since == patience:
            return step
    return None


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_stops_like_the_end_of_a_run(whole, config, tmp_path, capsys, patience):
    expected = stop_of(validations(whole), patience)
    assert expected is not None
    assert expected < 20
    stopping = in_folder(config, tmp_path / "run", patience=patience)
    result = fit(stopping)
    assert (result.steps, read_manifest(result.checkpoint)["step"]) == (expected, expected)
    assert validations(tmp_path / "run") == validations(whole)[:expected]
    assert f"(--patience {patience})" in capsys.readouterr().out
    before = (result.checkpoint.stat().st_mtime_ns, (tmp_path / "run/metrics.jsonl").read_bytes())
    again = fit(stopping)  # says why, and trains no step
    printed = capsys.readouterr().out
    assert f"stopped early, after {expected} of 20 steps: the validation loss has not been lower than" in printed
    assert "raise --patience to continue" in printed
    assert (again.checkpoint.stat().st_mtime_ns, (tmp_path / "run/metrics.jsonl").read_bytes()) == before
    assert again == result
    assert fit(dataclasses.replace(stopping, patience=0)).steps == 20  # and continues exactly
    assert validations(tmp_path / "run") == validations(whole)
    assert_same_best(tmp_path / "run", whole)


def test_resumed_run_keeps_and_stops_the_same(whole, config, tmp_path):
    expected, folder = stop_of(validations(whole), 3), tmp_path / "run"
    fit(in_folder(config, tmp_path / "stopped", patience=3))
    for steps in range(1, expected, 2):
        fit(in_folder(config, folder, patience=3, max_steps=steps))
    (folder / "metrics.jsonl").unlink()  # counters come from the training state
    assert fit(in_folder(config, folder, patience=3)).steps == expected
    assert_same_best(folder, tmp_path / "stopped")


def test_killed_after_the_best_was_written(whole, config, tmp_path):
    """Its checkpoint is later than the last state: the steps are repeated, with the same result."""
    step, folder = min(validations(whole), key=lambda pair: pair[1])[0], tmp_path / "run"
    fit(in_folder(config, folder, max_steps=step - 1))
    manifest = json.loads((whole / "rwkv-best.pth.json").read_text())
    manifest["run"] = json.loads((folder / "run.json").read_text())["id"]
    shutil.copy(whole / "rwkv-best.pth", folder)
    (folder / "rwkv-best.pth.json").write_text(json.dumps(manifest))
    fit(in_folder(config, folder))
    assert_same_best(folder, whole)
    (folder / "rwkv-best.pth").unlink()  # deleted: written again at the next validation
    fit(in_folder(config, folder, epoch_count=6))
    assert read_manifest(folder / "rwkv-best.pth")["step"] > 20


def test_missing_best_written_from_the_state(whole, config, tmp_path):
    step, folder = min(validations(whole), key=lambda pair: pair[1])[0], tmp_path / "run"
    fit(in_folder(config, folder, max_steps=step))
    (folder / "rwkv-best.pth").unlink()
    fit(in_folder(config, folder, max_steps=step))
    assert_same_best(folder, whole)


def test_best_adapter(make_base, data, tmp_path):
    flags = {key: value for key, value in SMALL.items() if key not in ("n_layer", "n_embd", "vocab_size")}
    flags |= {"val_split": 0.3, "val_every": 2, "keep_best": True, "epoch_count": 1}
    fit(LoRAConfig(**flags, load_model=str(make_base()), data_file=data, proj_dir=str(tmp_path / "run")))
    manifest = read_manifest(tmp_path / "run/rwkv-best.pth")
    assert (manifest["kind"], manifest["r"]) == ("adapter", 8)
    assert manifest["base_sha256"]


def test_foreign_best_kept_and_own_one_deleted(whole, config, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    fit(in_folder(config, tmp_path / "run", overwrite=True, keep_best=False, max_steps=1))
    assert not (tmp_path / "run/rwkv-best.pth").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/rwkv-best.pth").write_text("mine")
    with pytest.raises(UserError, match="rwkv-best.pth: --keep_best true would overwrite it"):
        fit(in_folder(config, tmp_path / "mine", overwrite=True))


@pytest.mark.parametrize(("flag", "value"), [("keep_best", True), ("patience", 3)])
def test_needs_validation(config, tmp_path, flag, value):
    flags = {"keep_best": False, "val_split": 0.0, "val_every": 0} | {flag: value}
    with pytest.raises(UserError, match=f"--{flag} {str(value).lower()} needs a validation set: pass --val_file"):
        fit(in_folder(config, tmp_path / "run", **flags))
