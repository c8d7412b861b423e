"""State tuning: what it trains and saves; it resumes and uses TBPTT like other runs."""

import math

import pytest
import torch

from rwkv import adapter_files
from rwkv.adapters import state
from rwkv.checkpoint import load_model, read_manifest, read_tensors
from rwkv.config import LoRAConfig, StateConfig, TrainConfig
from rwkv.data.binidx_writer import writer
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.models.version import VERSIONS
from rwkv.train.fit import fit
from tests.train.small_runs import assert_same_tensors, losses

RUN = {
    "ctx_len": 16,
    "micro_bsz": 2,
    "epoch_steps": 4,
    "epoch_count": 2,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "fp32",
    "doc_sep": 7,  # of random ids: documents inside the contexts
}


@pytest.fixture
def flags(request, make_base, make_data):
    base = make_base(version=getattr(request, "param", "7"), n_embd=32)
    return {**RUN, "load_model": str(base), "data_file": make_data(400)}


every_version = pytest.mark.parametrize("flags", VERSIONS, indirect=True)


@every_version
def test_trains_and_saves_the_state_only(flags, tmp_path):
    base = flags["load_model"]
    before = sha256(base)
    result = fit(StateConfig(**flags, proj_dir=str(tmp_path / "run")))
    assert sha256(base) == before
    tensors, model = read_tensors(result.checkpoint), load_model(base)
    assert {name: (x.shape, x.dtype) for name, x in tensors.items()} == {
        name: (shape, torch.float32) for name, shape in state.shapes_of(model.sizes).items()
    }
    assert all(tensor.any() for tensor in tensors.values())
    manifest = read_manifest(result.checkpoint)
    assert (manifest["kind"], manifest["parts"], manifest["base_sha256"]) == ("state", ["state"], before)
    assert "alpha" not in manifest


@pytest.mark.parametrize("flags", ["4", "7"], indirect=True)
def test_resumed_run_matches_uninterrupted(flags, tmp_path):
    whole = fit(StateConfig(**flags, proj_dir=str(tmp_path / "whole")))
    fit(StateConfig(**flags, proj_dir=str(tmp_path / "parts"), max_steps=3))
    parts = fit(StateConfig(**flags, proj_dir=str(tmp_path / "parts")))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert_same_tensors(whole.checkpoint, parts.checkpoint)
    recomputed = fit(StateConfig(**flags, proj_dir=str(tmp_path / "recomputed"), grad_cp=1))
    assert_same_tensors(whole.checkpoint, recomputed.checkpoint)
    fit(StateConfig(**flags, proj_dir=str(tmp_path / "chunks"), tbptt_len=5, exact=True))
    # fp32 sums in other order, over 8 steps with a rate of up to 1
    assert losses(tmp_path / "chunks") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_lora_with_state(flags, tmp_path):
    """`state` is a part of an adapter; an adapter without it is continued with an empty state."""
    common = {**flags, "lora_dropout": 0.0, "lr_init": 1e-2}
    first = fit(LoRAConfig(**common, proj_dir=str(tmp_path / "a"), lora_parts="att", max_steps=2))
    second = LoRAConfig(
        **common,
        proj_dir=str(tmp_path / "b"),
        lora_parts="att,state",
        lora_load=str(first.checkpoint),
        max_steps=3,
    )
    tensors = read_tensors(fit(second).checkpoint)
    assert (
        tensors.keys()
        == read_tensors(first.checkpoint).keys() | state.shapes_of(load_model(flags["load_model"]).sizes).keys()
    )
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith("time_state"))
    assert adapter_files.read_manifest(tmp_path / "b/rwkv-final.pth")["parts"] == ["att", "state"]
    assert adapter_files.load_tuned(flags["load_model"], tmp_path / "b/rwkv-final.pth")[0].sizes.time_state


def test_continues_from_a_state_with_a_new_optimizer(flags, tmp_path):
    first = fit(StateConfig(**flags, proj_dir=str(tmp_path / "a"), max_steps=3))
    constant = {"lr_init": 0.0, "lr_final": 0.0, "state_load": str(first.checkpoint), "max_steps": 1}
    second = fit(StateConfig(**flags | constant, proj_dir=str(tmp_path / "b")))
    assert_same_tensors(first.checkpoint, second.checkpoint)
    adapter = fit(LoRAConfig(**flags, proj_dir=str(tmp_path / "lora"), lora_parts="att,state", max_steps=1))
    with pytest.raises(UserError, match="not a tuned state, .* but a LoRA adapter; continue it with"):
        fit(StateConfig(**flags | {"state_load": str(adapter.checkpoint)}, proj_dir=str(tmp_path / "c")))


def test_other_run_in_the_folder_is_not_resumed(flags, tmp_path):
    fit(StateConfig(**flags, proj_dir=str(tmp_path / "run"), max_steps=1))
    with pytest.raises(UserError, match="trained: an initial state → an adapter"):
        fit(LoRAConfig(**flags, proj_dir=str(tmp_path / "run")))


# Two continuations of a token, between which a document decides with its second token: without a
# state no model's loss is below ln 2 for the first of three targets, on average ln 2 / 3.
FLOOR = math.log(2) / 3
NARROW = {**RUN, "ctx_len": 32, "micro_bsz": 4, "doc_training": 1, "doc_reset": 1, "doc_sep": -1, "epoch_count": 1}


def write(path, steps):
    generator = torch.Generator().manual_seed(0)
    with writer(path) as out:
        for _ in range(400):
            first, step = (int(torch.randint(n, (1,), generator=generator)) for n in (16, len(steps)))
            out.add([1 + (first + i * steps[step]) % 16 for i in range(4)])
    return str(path)


def test_learns_a_narrow_dataset(tmp_path):
    sizes = {"version": "5.2", "n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": 17}
    both = {**NARROW, **sizes, "data_file": write(tmp_path / "both", (3, 5)), "epoch_steps": 80}
    base = fit(TrainConfig(**both, proj_dir=str(tmp_path / "base"), lr_init=2e-2, lr_final=2e-3))
    assert FLOOR * 0.9 < base.last_loss < FLOOR * 1.3  # it has learned both; a mean over random documents
    narrow = {**NARROW, "data_file": write(tmp_path / "one", (3,)), "epoch_steps": 40}
    tuned = fit(StateConfig(**narrow, load_model=str(base.checkpoint), proj_dir=str(tmp_path / "state")))
    assert tuned.first_loss > FLOOR * 0.8
    assert tuned.last_loss < FLOOR * 0.75
