"""Upstream's stages of pretraining, as reference/upstream.md describes them: each number here is worked out by hand."""

import json
import math

import pytest
import torch

from rwkv.checkpoint import read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.train import optimizer, pile
from rwkv.train.fit import fit

# 81000 tokens hold 80999 contexts of one; the largest prime below that leaves 2 when divided by 3, and 40320 goes into it twice
FLAGS = {
    "ctx_len": 1,
    "micro_bsz": 4032,
    "random_seed": 1,
    "accelerator": "cpu",
    "n_layer": 2,
    "n_embd": 8,
    "vocab_size": 50,
    "epoch_save": 1,
}


@pytest.fixture
def flags(make_data, tmp_path):
    return FLAGS | {"data_file": make_data(81000), "proj_dir": str(tmp_path / "run")}


def test_the_stages_in_a_row(flags, tmp_path):
    fit(TrainConfig(**flags, my_pile_stage=1))
    new = read_tensors(tmp_path / "run/rwkv-init.pth")
    assert not new["blocks.0.att.key.weight"].any()  # upstream's rule
    with pytest.raises(UserError, match="rwkv-init.pth exists already"):
        fit(TrainConfig(**flags, my_pile_stage=1))
    assert fit(TrainConfig(**flags, my_pile_stage=3)).steps == 20
    run = json.loads((tmp_path / "run/run.json").read_text())["flags"]
    assert (run["epoch_steps"], run["epoch_count"], run["epoch_begin"], run["warmup_steps"]) == (10, 2, 0, -1)
    prime = run["magic_prime"]
    assert prime // 40320 == 2
    assert prime % 3 == 2
    assert all(prime % n for n in range(2, math.isqrt(prime) + 1))
    assert run["load_model"].endswith("rwkv-init.pth")
    assert {path.name for path in (tmp_path / "run").glob("*.pth")} == {"rwkv-init.pth", "rwkv-0.pth", "rwkv-1.pth"}


def test_a_stage_goes_on_exactly_and_from_upstreams_files(flags, tmp_path):
    fit(TrainConfig(**flags, my_pile_stage=1))
    fit(TrainConfig(**flags, my_pile_stage=3, max_steps=13))
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "rwkv-init.pth").write_bytes((tmp_path / "run/rwkv-init.pth").read_bytes())
    assert fit(TrainConfig(**flags, my_pile_stage=3)).steps == 20  # at step 13, though rwkv-0.pth is there
    fit(TrainConfig(**flags | {"proj_dir": str(whole)}, my_pile_stage=3))
    ours, theirs = (read_tensors(folder / "rwkv-1.pth") for folder in (tmp_path / "run", whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    bare = tmp_path / "bare"  # what upstream leaves
    bare.mkdir()
    (bare / "rwkv-0.pth").write_bytes((whole / "rwkv-0.pth").read_bytes())
    (bare / "rwkv-1.pth").write_bytes((whole / "rwkv-1.pth").read_bytes()[:-50])
    for stage, warmup in ((2, 10), (3, 30)):
        found = pile.apply(TrainConfig(**flags | {"proj_dir": str(bare)}, my_pile_stage=stage), bare)
        assert (found.load_model, found.epoch_begin, found.warmup_steps) == (str(bare / "rwkv-0.pth"), 1, warmup)
    assert pile.apply(TrainConfig(**flags | {"proj_dir": str(bare)}, my_pile_stage=4), bare).magic_prime == 0  # at random places


def test_stage_2_learns_what_is_called_time_five_times_as_fast(make_model):
    found = {name: g["lr_scale"] for g in optimizer.groups(make_model(), TrainConfig(my_pile_stage=2)) for name in g["names"]}
    assert all(scale == (5 if "time_" in name else 1) for name, scale in found.items())


REFUSED = [
    ({"micro_bsz": 11}, "cannot be divided by a batch of 11; the nearest --micro_bsz is 10"),
    ({"ctx_len": 4}, "holds 20249 contexts of 4"),
    ({}, "no rwkv-init.pth or rwkv-N.pth in .*; make one with --my_pile_stage 1"),
]


@pytest.mark.parametrize(("other", "complaint"), REFUSED)
def test_what_a_stage_cannot_do_is_refused(flags, other, complaint):
    with pytest.raises(UserError, match=complaint):
        fit(TrainConfig(**flags | other, my_pile_stage=3))
    with pytest.raises(UserError, match="belongs to pretraining"):
        fit(LoRAConfig(**flags | other, my_pile_stage=3))
