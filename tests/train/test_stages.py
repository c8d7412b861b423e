"""Upstream's pretraining stages; expected values are computed by hand from upstream's rules."""

import json
import math

import pytest
import torch

from rwkv.checkpoint import read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.models.version import VERSIONS
from rwkv.train import stages
from rwkv.train.fit import fit
from rwkv.train.loop import optimizer

# 81000 tokens have 80999 contexts of length 1; magic_prime is the largest prime below with
# remainder 2 modulo 3, and an epoch of 40320 samples fits twice
FLAGS = {
    "ctx_len": 1,
    "micro_bsz": 4032,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "fp32",
    "n_layer": 2,
    "version": "4",
    "n_embd": 8,
    "vocab_size": 50,
    "epoch_save": 1,
}


@pytest.fixture
def flags(make_data, tmp_path):
    return FLAGS | {"data_file": make_data(81000), "proj_dir": str(tmp_path / "run")}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stage_1_ignores_training_flags(flags, tmp_path, precision):
    # as in RWKV-LM's demo-training-prepare.sh: nothing is trained, so neither DeepSpeed nor a GPU
    # is needed
    fit(
        TrainConfig(
            **flags | {"strategy": "deepspeed_stage_2", "precision": precision, "accelerator": "gpu"}, my_pile_stage=1
        )
    )
    assert (tmp_path / "run/rwkv-init.pth").is_file()


def test_stages_in_sequence(flags, tmp_path):
    fit(TrainConfig(**flags, my_pile_stage=1))
    new = read_tensors(tmp_path / "run/rwkv-init.pth")
    assert not new["blocks.0.att.key.weight"].any()  # upstream's rule
    with pytest.raises(UserError, match="rwkv-init.pth already exists"):
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


def test_resume_stage(flags, tmp_path):
    fit(TrainConfig(**flags, my_pile_stage=1))
    fit(TrainConfig(**flags, my_pile_stage=3, max_steps=13))
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    (uninterrupted / "rwkv-init.pth").write_bytes((tmp_path / "run/rwkv-init.pth").read_bytes())
    assert fit(TrainConfig(**flags, my_pile_stage=3)).steps == 20  # from step 13, although rwkv-0.pth exists
    fit(TrainConfig(**flags | {"proj_dir": str(uninterrupted)}, my_pile_stage=3))
    ours, theirs = (read_tensors(folder / "rwkv-1.pth") for folder in (tmp_path / "run", uninterrupted))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    bare = tmp_path / "bare"  # as left by upstream
    bare.mkdir()
    (bare / "rwkv-0.pth").write_bytes((uninterrupted / "rwkv-0.pth").read_bytes())
    (bare / "rwkv-1.pth").write_bytes((uninterrupted / "rwkv-1.pth").read_bytes()[:-50])
    for stage, warmup in ((2, 10), (3, 30)):
        found = stages.apply(TrainConfig(**flags | {"proj_dir": str(bare)}, my_pile_stage=stage))
        assert (found.load_model, found.epoch_begin, found.warmup_steps) == (str(bare / "rwkv-0.pth"), 1, warmup)
    # random sampling
    assert stages.apply(TrainConfig(**flags | {"proj_dir": str(bare)}, my_pile_stage=4)).magic_prime == 0


def resized(old, n):
    """Upstream's resizing from m to n elements: element i is interpolated linearly at position i ·
    m/n, clamped to the last.
    """
    found = []
    for i in range(n):
        position = i / n * len(old)
        low = math.floor(position)
        found.append(
            old[-1] if position >= len(old) - 1 else old[low] * (1 - (position - low)) + old[low + 1] * (position - low)
        )
    return torch.stack(found)


def test_stage_1_resizes_load_model(flags, make_base, make_model, tmp_path):
    base = make_base(n_embd=8)
    fit(TrainConfig(**flags | {"vocab_size": 70, "n_layer": 3}, my_pile_stage=1, load_model=str(base)))
    old, new = read_tensors(base), read_tensors(tmp_path / "run/rwkv-init.pth")
    for name in ("emb.weight", "head.weight"):
        torch.testing.assert_close(new[name], resized(old[name], 70))
    assert all(torch.equal(new[name], old[name]) for name in old if name not in ("emb.weight", "head.weight"))
    assert not new["blocks.2.att.output.weight"].any()  # new, by upstream's rule
    # vectors of another width, which only a model without matrices of that width allows
    grown = make_model(n_embd=8, vocab_size=50, dim_att=12)
    vectors = {name: x for name, x in old.items() if "time_decay" in name or name == "ln_out.bias"}
    torch.save(vectors, tmp_path / "vectors.pth")
    stages._resize_into(grown, str(tmp_path / "vectors.pth"))
    torch.testing.assert_close(grown.blocks[1].att.time_decay.detach(), resized(old["blocks.1.att.time_decay"], 12))
    assert torch.equal(grown.ln_out.bias, old["ln_out.bias"])


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_stage_1_resizes_later_versions(flags, make_base, tmp_path, version):
    base = make_base(version=version)
    grown = {"version": version, "n_embd": 16, "head_size": 16, "vocab_size": 70, "n_layer": 3}
    fit(TrainConfig(**flags | grown, my_pile_stage=1, load_model=str(base)))
    old, new = read_tensors(base), read_tensors(tmp_path / "run/rwkv-init.pth")
    for name in ("emb.weight", "head.weight"):
        torch.testing.assert_close(new[name], resized(old[name], 70))
    assert all(torch.equal(new[name], old[name]) for name in old if name not in ("emb.weight", "head.weight"))
    assert {name.split(".")[1] for name in new.keys() - old.keys()} == {"2"}


@pytest.mark.parametrize(
    ("other", "message"),
    [({"n_layer": 1}, "a model of these sizes has no blocks.1."), ({"n_embd": 16}, "only vectors and")],
)
def test_stage_1_size_mismatch(flags, make_base, tmp_path, other, message):
    with pytest.raises(UserError, match=message):
        fit(TrainConfig(**flags | other, my_pile_stage=1, load_model=str(make_base(n_embd=8))))
    assert not (tmp_path / "run/rwkv-init.pth").exists()


def test_stage_1_needs_whole_model(flags, make_base, tmp_path):
    tensors = read_tensors(make_base(n_embd=8))
    later = {name: x[None] if "time_decay" in name else x for name, x in tensors.items()}
    times = {name: x for name, x in tensors.items() if ".time_" in name}
    for content, complaint in (
        (later, "version 5 or later"),
        ({**tensors, "head.weight": tensors["head.weight"][:0]}, r"wrong shape: head.weight \[0, 8\]"),
        (times, "not an RWKV-4 checkpoint"),  # an adapter of the part time
        ({name: x for name, x in tensors.items() if "ln_out" not in name}, "missing: ln_out"),
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match=f"x.pth: .*{complaint}"):
            fit(TrainConfig(**flags, my_pile_stage=1, load_model=str(tmp_path / "x.pth")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("version", VERSIONS)
def test_load_partial(flags, make_base, tmp_path, version):
    base, no_update = (
        make_base(n_embd=8) if version == "4" else make_base(version=version),
        {"ctx_len": 8, "micro_bsz": 2, "epoch_steps": 1, "epoch_count": 1, "lr_init": 0.0, "lr_final": 0.0},
    )
    grown = {
        **flags,
        **no_update,
        "n_layer": 4,
        "version": version,
        "n_embd": 0,
        "vocab_size": 0,
        "load_model": str(base),
        "load_partial": 1,
    }
    result = fit(TrainConfig(**grown))
    old, new = read_tensors(base), read_tensors(result.checkpoint)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert {name.split(".")[1] for name in new.keys() - old.keys()} == {"2", "3"}
    as_before = fit(TrainConfig(**grown | {"n_layer": 0, "load_partial": 0, "proj_dir": str(tmp_path / "before")}))
    assert result.first_loss == pytest.approx(as_before.first_loss, rel=1e-6)  # new layers start as identity
    with pytest.raises(UserError, match="wrong shape"):
        fit(TrainConfig(**grown | {"n_embd": 32, "proj_dir": str(tmp_path / "wide")}))
    with pytest.raises(UserError, match="--load_partial 1 completes --load_model"):
        fit(TrainConfig(**grown | {"load_model": "", "proj_dir": str(tmp_path / "none")}))


def test_stage_2_lr_of_time_parameters(make_model):
    found = {
        name: g["lr_scale"] for g in optimizer.groups(make_model(), TrainConfig(my_pile_stage=2)) for name in g["names"]
    }
    assert all(scale == (5 if "time_" in name else 1) for name, scale in found.items())


INVALID_STAGE_FLAGS = [
    ({"micro_bsz": 11}, "are not divisible by the batch size 11; the nearest --micro_bsz is 10"),
    ({"ctx_len": 4}, "has only 20249 contexts of 4"),
    ({}, "no rwkv-init.pth or rwkv-N.pth in .*; create one with --my_pile_stage 1"),
]


@pytest.mark.parametrize(("other", "message"), INVALID_STAGE_FLAGS)
def test_invalid_stage_flags(flags, other, message):
    with pytest.raises(UserError, match=message):
        fit(TrainConfig(**flags | other, my_pile_stage=3))
    with pytest.raises(UserError, match="is for pretraining"):
        fit(LoRAConfig(**flags | other, my_pile_stage=3))


@pytest.mark.parametrize("name", ["micro_bsz", "ctx_len"])
def test_zero_rejected_before_stage_arithmetic(flags, name):
    with pytest.raises(UserError, match=f"--{name} must be at least 1"):
        fit(TrainConfig(**{**flags, name: 0}, my_pile_stage=2))


def test_finetune_finds_stage_checkpoint(flags, script, tmp_path):
    """As upstream: --load_model is not needed, and the newest rwkv-N.pth is loaded."""
    fit(TrainConfig(**flags, my_pile_stage=1))
    arguments = [str(word) for key, value in (flags | {"max_steps": 1}).items() for word in (f"--{key}", value)]
    script("finetune.py", *arguments, "--my_pile_stage", "3")
    run = json.loads((tmp_path / "run/run.json").read_text())["flags"]
    assert run["load_model"].endswith("rwkv-init.pth")
    result = script("finetune.py", *arguments, status=1)
    assert "full fine-tuning needs a model: pass --load_model" in result.stderr
