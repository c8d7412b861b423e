"""LoRA runs: what they train and save, and with which precision."""

import pytest
import torch

from rwkv import compat
from rwkv.adapter_files import load_tuned
from rwkv.adapters import lora
from rwkv.checkpoint import read_manifest, read_tensors
from rwkv.config import LoRAConfig
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.merge import merge
from rwkv.train import setup
from rwkv.train.fit import fit
from rwkv.train.run import Run
from tests.train.small_runs import SMALL, TUNE, lines


def test_lora_saves_adapter_only(make_base, make_data, tmp_path):
    base = make_base()
    before = base.read_bytes()
    result = fit(
        LoRAConfig(
            **TUNE, load_model=str(base), data_file=make_data(200), proj_dir=str(tmp_path / "run"), lora_parts="att"
        )
    )
    assert base.read_bytes() == before
    assert all(".att." in key and ".lora_" in key for key in read_tensors(result.checkpoint))
    manifest = read_manifest(result.checkpoint)
    assert (manifest["kind"], manifest["r"], manifest["alpha"], manifest["base"], manifest["base_sha256"]) == (
        "adapter",
        8,
        32,
        "../base.pth",  # relative to the adapter
        sha256(base),
    )
    assert load_tuned(base, result.checkpoint)[0].sizes.n_layer == 2


def test_lora_from_scratch(make_data, tmp_path):
    folder = tmp_path / "run"
    result = fit(
        LoRAConfig(
            **SMALL, data_file=make_data(200), proj_dir=str(folder), lora_parts="att,ffn", lr_init=1e-2, lr_final=1e-2
        )
    )
    base, adapter = read_tensors(folder / "rwkv-base.pth"), read_tensors(result.checkpoint)
    assert read_manifest(result.checkpoint)["base_sha256"] == sha256(folder / "rwkv-base.pth")
    assert not any("lora" in name for name in base)
    # upstream would initialise A, B and the frozen output matrix of most layers to 0: no gradient,
    # ever
    assert all(tensor.any() for name, tensor in adapter.items() if name.endswith("lora_A"))
    moved = [name for name, tensor in adapter.items() if name.endswith("lora_B") and tensor.any()]
    assert len(moved) == sum(name.endswith("lora_B") for name in adapter)
    load_tuned(folder / "rwkv-base.pth", result.checkpoint)


def test_lora_load(make_base, make_data, tmp_path):
    common = {
        **TUNE,
        "load_model": str(make_base()),
        "data_file": make_data(200),
        "lora_dropout": 0.0,
        "magic_prime": -1,
    }
    first = fit(LoRAConfig(**common, proj_dir=str(tmp_path / "a"), lr_init=1e-2))
    second = fit(
        LoRAConfig(
            **common,
            proj_dir=str(tmp_path / "b"),
            lora_load=str(first.checkpoint),
            lr_init=0.0,
            lr_final=0.0,
            max_steps=1,
        )
    )
    ours, theirs = read_tensors(second.checkpoint), read_tensors(first.checkpoint)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert any(value.any() for key, value in theirs.items() if key.endswith("lora_B"))


def test_lora_off(make_base, make_data, tmp_path):
    result = fit(
        LoRAConfig(
            **TUNE, lora=False, load_model=str(make_base()), data_file=make_data(200), proj_dir=str(tmp_path / "run")
        )
    )
    assert read_manifest(result.checkpoint)["kind"] == "model"


def test_bf16_base_without_bf16_broadcast(make_base, make_data, tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "gloo_supports_bf16", lambda: False)  # as torch 1.13.1, on CPUs
    flags = {
        **TUNE,
        "load_model": str(make_base()),
        "data_file": make_data(200),
        "proj_dir": str(tmp_path / "run"),
        "strategy": "ddp",
    }
    with pytest.raises(UserError, match="--lora_base bf16: ddp on CPUs broadcasts the weights"):
        fit(LoRAConfig(**flags, lora_base="bf16"))
    assert not (tmp_path / "run").exists()
    alone = LoRAConfig(**{**flags, "strategy": "auto"}, lora_base="bf16")
    sizes = setup.sizes_of(alone)
    assert setup.load_or_create(Run(alone, sizes, on_gpu=False)) is not None
    model = setup.load_or_create(Run(LoRAConfig(**flags | {"precision": "bf16"}), sizes, on_gpu=False))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_lora_on_bf16_base_follows_fp32(make_base, make_data, tmp_path, monkeypatch):
    stored, trained = [], []
    store = lora.store_frozen
    monkeypatch.setattr(
        lora, "store_frozen", lambda model, dtype: (store(model, dtype), stored.append(dtype), trained.append(model))[0]
    )
    common = {**TUNE, "load_model": str(make_base()), "data_file": make_data(200), "lora_dropout": 0.0, "lr_init": 1e-2}
    flags = {
        "fp32": {},
        "bf16": {},
        "bf16 on an fp32 base": {"precision": "bf16", "lora_base": "fp32"},
        "fp32 on a bf16 base": {"precision": "fp32", "lora_base": "bf16"},
    }
    for name, given in flags.items():
        fit(LoRAConfig(**common | {"precision": name} | given, proj_dir=str(tmp_path / name)))
    assert stored == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    for dtype, model in zip(stored, trained, strict=True):
        assert model.head.weight.dtype == dtype
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = {name: [line["loss"] for line in lines(tmp_path / name)] for name in flags}
    for name, curve in losses.items():
        assert curve == pytest.approx(losses["fp32"], rel=0.02)  # bf16 keeps 8 significant bits
        assert (curve == losses["fp32"]) == (name == "fp32")


def test_dora_and_rslora_on_all_matrices(make_base, make_data, tmp_path):
    base = make_base(version="7")
    flags = {**TUNE, "load_model": str(base), "data_file": make_data(200), "lr_init": 1e-2, "lora_dropout": 0.1}
    flags |= {"lora_parts": "all-linear,ln", "use_dora": True, "use_rslora": True, "lora_r": 4, "lora_alpha": 8}
    whole = fit(LoRAConfig(**flags, proj_dir=str(tmp_path / "whole")))
    fit(LoRAConfig(**flags, proj_dir=str(tmp_path / "parts"), max_steps=5))
    parts = fit(LoRAConfig(**flags, proj_dir=str(tmp_path / "parts")))
    assert lines(tmp_path / "whole")[-1]["loss"] == lines(tmp_path / "parts")[-1]["loss"]
    ours, theirs = read_tensors(whole.checkpoint), read_tensors(parts.checkpoint)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    before = {name: x.norm(dim=1) for name, x in read_tensors(base).items() if x.dim() == 2}
    magnitudes = {name: x for name, x in ours.items() if name.endswith("lora_magnitude_vector")}
    assert len(magnitudes) == sum(name.endswith("lora_B") for name in ours) > 10
    assert all(
        not torch.equal(x, before[name.replace("lora_magnitude_vector", "weight")]) for name, x in magnitudes.items()
    )
    manifest = read_manifest(whole.checkpoint)
    assert (manifest["alpha"], manifest["use_dora"]) == (16, True)  # alpha / r = 8 / √4
    merged = merge(str(tmp_path / "merged.pth"), [str(whole.checkpoint)], [1.0], base, check_tokens=20)
    assert merged.difference < 1e-4 * merged.largest  # fp32 rounding of the merged weights
    with pytest.raises(UserError, match="a DoRA adapter, .* merge it alone, with weight 1"):
        merge(str(tmp_path / "half.pth"), [str(whole.checkpoint)], [0.5], base)
    again = {**flags, "lora_load": str(whole.checkpoint), "max_steps": 1}
    for change, message in (
        ({"use_dora": False}, "this is a DoRA adapter, and the run trains LoRA; pass --use_dora true"),
        ({"use_rslora": False}, "trained with alpha 16, but --lora_alpha is 8, .* Use --lora_alpha 16"),
        ({"lora_alpha": 4}, r"--lora_alpha is 4 \(with --use_rslora 8\), .* scale it by 0.5. Use --lora_alpha 8"),
    ):
        with pytest.raises(UserError, match=message):
            fit(LoRAConfig(**again | change, proj_dir=str(tmp_path / "other")))
    fit(LoRAConfig(**again | {"lr_init": 0.0, "lr_final": 0.0}, proj_dir=str(tmp_path / "again")))
    same = read_tensors(tmp_path / "again/rwkv-final.pth")
    assert all(torch.equal(ours[key], same[key]) for key in ours)
