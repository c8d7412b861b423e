"""Folders of Hugging Face peft: LoRA adapters are read; other methods are rejected."""

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rwkv import adapter_files
from rwkv.adapter_files import inspect_adapter
from rwkv.checkpoint import load_model, read_tensors
from rwkv.config import LoRAConfig
from rwkv.errors import UserError
from rwkv.train.fit import fit


def peft_tensors(model, names=("att.key", "ffn.value"), form="base_model.model.{}.lora_{}.weight"):
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(len(model.blocks)):
        for name in names:
            out, columns = model.get_parameter(f"blocks.{layer}.{name}.weight").shape
            for half, shape in (("A", (4, columns)), ("B", (out, 4))):
                tensors[form.format(f"blocks.{layer}.{name}", half)] = torch.randn(shape, generator=generator) * 0.1
    return tensors


def peft_folder(folder: Path, tensors, ending=".safetensors", **settings) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"adapter_model{ending}"
    safetensors.torch.save_file(tensors, path) if ending == ".safetensors" else torch.save(tensors, path)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "RWKV/x", **settings})
    )
    return folder


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    "form",
    [
        "base_model.model.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.default.weight",
        "base_model.model.model.{}.lora_{}.weight",
    ],
)
def test_peft_adapter_loaded(tmp_path, make_base, make_model, ending, form):
    base, model = make_base(), make_model()
    tensors = peft_tensors(model, form=form)
    folder = peft_folder(tmp_path / "pf", tensors, ending)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        for layer in range(2):
            for name in ("att.key", "ffn.value"):
                a, b = (tensors[form.format(f"blocks.{layer}.{name}", half)] for half in "AB")
                model.get_parameter(f"blocks.{layer}.{name}.weight").add_(2 * b @ a)
        expected = model.eval()(tokens)[0]
        for path in (folder, folder / f"adapter_model{ending}"):
            tuned, _ = adapter_files.load_tuned(base, path)
            torch.testing.assert_close(
                tuned.eval()(tokens)[0], expected, rtol=1e-4, atol=1e-5
            )  # fp32, different summation order
    with pytest.raises(UserError, match="a folder with a peft adapter, not a model"):
        load_model(folder)


def test_training_continues_peft_adapter(tmp_path, make_base, make_model, make_data):
    folder = peft_folder(tmp_path / "pf", peft_tensors(make_model()))
    flags = {"ctx_len": 8, "micro_bsz": 1, "epoch_steps": 2, "epoch_count": 1, "max_steps": 1, "accelerator": "cpu"}
    config = LoRAConfig(
        **flags,
        load_model=str(make_base()),
        data_file=make_data(200),
        proj_dir=str(tmp_path / "run"),
        lora_load=str(folder),
        lora_r=4,
        lora_alpha=8,
        lora_parts="att.key,ffn.value",
        lr_init=0,
        lr_final=0,
    )
    made = read_tensors(fit(config).checkpoint)
    expected = read_tensors(folder / "adapter_model.safetensors")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    fit(dataclasses.replace(config, max_steps=2))
    peft_folder(tmp_path / "pf", {name: 2 * tensor for name, tensor in expected.items()})
    with pytest.raises(UserError, match=r"--lora_load \(SHA-256\)"):
        fit(dataclasses.replace(config, max_steps=2))


def test_rank_differs_from_adapter_config(tmp_path, make_model):
    folder = peft_folder(tmp_path / "pf", peft_tensors(make_model()), r=8)
    with pytest.raises(UserError, match=r"pf: rank 4, but adapter_config.json states 8; that file belongs to another"):
        inspect_adapter(folder)


def test_rslora_scale_matches_peft(tmp_path, make_model):
    folder = peft_folder(tmp_path / "pf", peft_tensors(make_model()), use_rslora=True)
    assert inspect_adapter(folder)[1]["alpha"] / 4 == 8 / 4**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "of type 'IA3', but only LORA"),
        ({"peft_type": ["x"]}, "of type list"),
        ({"rank_pattern": {"att.key": 8}}, "has rank_pattern"),
        ({"modules_to_save": ["head"]}, "has modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised with init_lora_weights 'pissa_niter_4'"),
        ({"bias": "all"}, "trains biases"),
        ({"r": "4"}, "its r is '4', not a positive integer"),
        ({"r": 8}, ": rank 4, but"),
        ({"lora_alpha": None}, "its lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "its lora_alpha is nan"),
    ],
)
def test_unsupported_peft_features(tmp_path, make_model, settings, message):
    folder = peft_folder(tmp_path / "pf", peft_tensors(make_model()), **settings)
    with pytest.raises(UserError, match=message):
        inspect_adapter(folder)


def test_unknown_peft_layer(tmp_path, make_model):
    tensors = peft_tensors(make_model())
    tensors |= {
        "base_model.model.head.lora_A.weight": torch.zeros(4, 16),
        "base_model.model.head.lora_B.weight": torch.zeros(50, 4),
    }
    with pytest.raises(UserError, match="adapts head, but only att.receptance, .* can have adapters here"):
        inspect_adapter(peft_folder(tmp_path / "pf", tensors))
    (tmp_path / "pf/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        inspect_adapter(tmp_path / "pf")
