"""What a LoRA run starts from: a new base that is saved, or adapters with fewer or other parts."""

import json
import shutil

import pytest
import torch

from rwkv import checkpoint
from rwkv.checkpoint import read_manifest, read_tensors
from rwkv.config import LoRAConfig
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.models import RWKV
from rwkv.train.fit import fit
from tests.train.finished_run import changed
from tests.train.small_runs import losses

TUNE = {
    "ctx_len": 8,
    "micro_bsz": 2,
    "epoch_steps": 4,
    "epoch_count": 2,
    "random_seed": 1,
    "accelerator": "cpu",
    "lr_init": 1e-2,
}
NEW = {"version": "4", "n_layer": 2, "n_embd": 16, "vocab_size": 50, "lora_parts": "att,ffn"}


@pytest.fixture
def config(make_data, tmp_path):
    """Config of LoRA on a new base."""
    return LoRAConfig(**TUNE, **NEW, data_file=make_data(300), proj_dir=str(tmp_path / "run"))


def test_resume_uses_saved_base(config, tmp_path, monkeypatch):
    """Initialising again could give another base: orthogonal matrices depend on the machine's
    LAPACK.
    """
    fit(changed(config, proj_dir=str(tmp_path / "uninterrupted")))
    fit(changed(config, max_steps=5))
    base = sha256(tmp_path / "run/rwkv-base.pth")
    initialise = RWKV.initialise

    def other_initialise(model, **options):
        initialise(model, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)

    monkeypatch.setattr(RWKV, "initialise", other_initialise)
    shutil.move(tmp_path / "run", tmp_path / "moved")  # nothing depends on where the folder is
    result = fit(changed(config, proj_dir=str(tmp_path / "moved")))
    assert losses(tmp_path / "moved") == losses(tmp_path / "uninterrupted")
    assert read_manifest(result.checkpoint)["base_sha256"] == base == sha256(tmp_path / "moved/rwkv-base.pth")
    run = json.loads((tmp_path / "moved/run.json").read_text())
    assert run["base"]["sha256"] == base


@pytest.mark.parametrize("wrong", ["replaced", "missing"])
def test_replaced_or_missing_base(config, tmp_path, make_model, wrong):
    fit(changed(config, max_steps=5))
    path = tmp_path / "run/rwkv-base.pth"
    original = path.read_bytes()
    if wrong == "missing":
        path.unlink()
    else:
        checkpoint.save_model(path, make_model(seed=7), {})
    with pytest.raises(
        UserError, match=r"base model \(SHA-256\)" if wrong == "replaced" else "rwkv-base.pth: missing; .* Restore it"
    ):
        fit(config)
    path.write_bytes(original)
    assert fit(config).steps == 8


def test_resume_without_recorded_base(config, tmp_path):
    fit(changed(config, max_steps=5))
    run = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(run | {"base": None}))
    assert fit(config).steps == 8
    assert json.loads((tmp_path / "run/run.json").read_text())["base"]["sha256"] == sha256(
        tmp_path / "run/rwkv-base.pth"
    )


@pytest.fixture
def tuned(make_base, make_data, tmp_path):
    """Flags of LoRA on an existing base, and a function that trains an adapter."""
    common = TUNE | {"load_model": str(make_base()), "data_file": make_data(300), "lora_dropout": 0.0}

    def make(name, **flags):
        return fit(LoRAConfig(**{**common, "proj_dir": str(tmp_path / name), **flags}))

    return common, make


@pytest.mark.parametrize(
    ("fewer", "more"),
    [
        ("att", "att,ffn,time,ln"),
        ("time,ln", "att,time,ln"),
        ("att.key", "att,ln"),
        ("ffn,ln", "att,ffn,ln"),
        ("att", "att"),
    ],
)
def test_lora_load_with_fewer_parts(tuned, fewer, more):
    common, make = tuned
    adapter = make("few", lora_parts=fewer).checkpoint
    result = make("more", lora_parts=more, lora_load=str(adapter), lr_init=0.0, lr_final=0.0, max_steps=1)
    base, before, after = (read_tensors(path) for path in (common["load_model"], adapter, result.checkpoint))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (len(after) > len(before)) == (fewer != more)
    for name in after.keys() - before.keys():
        if name.endswith("lora_B"):
            assert not after[name].any()
        elif not name.endswith("lora_A"):
            assert torch.equal(after[name], base[name])


INCOMPATIBLE = [
    (
        {"lora_parts": "att,ffn,time"},
        {"lora_parts": "att,ln"},
        r"parts that --lora_parts att,ln lacks \(ffn.key, .*time\).* Use --lora_parts att,ffn,time or",
    ),
    (
        {"lora_r": 8},
        {"lora_r": 4},
        "has rank 8, but --lora_r is 4; the rank cannot be changed. Use --lora_r 8, or merge it .*merge_lora.py --adapter .*/a/rwkv-1.pth --base .*/base.pth --output merged.pth$",
    ),
    (
        {"lora_alpha": 32},
        {"lora_alpha": 16},
        "was trained with alpha 32, but --lora_alpha is 16, .* by 0.5. Use --lora_alpha 32, or merge it",
    ),
]


@pytest.mark.parametrize(("first", "then", "message"), INCOMPATIBLE)
def test_incompatible_adapter(tuned, tmp_path, first, then, message):
    _, make = tuned
    adapter = make("a", **first).checkpoint
    with pytest.raises(UserError, match=message):
        make("b", **then, lora_load=str(adapter))
    assert not (tmp_path / "b").exists()


def test_incomplete_adapter(tuned, tmp_path):
    _, make = tuned
    adapter = make("a", lora_parts="att,ln").checkpoint
    tensors = read_tensors(adapter)
    del tensors["blocks.1.att.key.lora_B"]
    checkpoint.write_tensors(tmp_path / "cut.pth", tensors, read_manifest(adapter))
    with pytest.raises(UserError, match="blocks.1.att.key.lora_B"):
        make("b", lora_parts="att,ffn,ln", lora_load=str(tmp_path / "cut.pth"))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"version": "8"}, "--version 8: not one of 4, 5.2, 6, 7"),
        ({"version": "7", "dim_att": 32}, "--dim_att 32: RWKV-7 models have no dim_att"),
        ({"version": "7", "pre_ffn": 1}, "--pre_ffn 1: RWKV-7 models have no pre_ffn"),
        ({"head_size": 16}, "--head_size 16: RWKV-4 models have no head_size"),
        ({"version": "7", "n_embd": 40, "head_size": 16}, "width 40 is not a multiple of the head size 16"),
    ],
    ids=str,
)
def test_size_flags_of_another_version(config, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        fit(changed(config, **flags))


def test_version_of_checkpoint_differs(config, make_base):
    base = make_base(version="7", n_embd=32)
    with pytest.raises(UserError, match="an RWKV-7 model, but --version is 4"):
        fit(changed(config, load_model=str(base), version="4", n_layer=0, n_embd=0, vocab_size=0))
    with pytest.raises(UserError, match="--head_size 32, but it has 16"):
        fit(changed(config, load_model=str(base), version="", head_size=32, n_layer=0, n_embd=0, vocab_size=0))
