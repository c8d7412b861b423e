"""Adapters that RWKV-PEFT wrote for RWKV-7: its own .pth files, and folders of Hugging Face's
peft.
"""

import json
import re

import pytest
import safetensors.torch
import torch

from rwkv.adapter_files import inspect_adapter, load_tuned
from rwkv.checkpoint import read_tensors
from rwkv.config import LoRAConfig
from rwkv.errors import UserError
from rwkv.train.fit import fit

LAYERS = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
NORM = re.compile(r"\bln")  # what its part `ln` trains; its part `time` matches nothing in RWKV-7
PTH = "{}.lora_{}"
FORMS = {
    ".pth": PTH,
    ".pth with prefix": "model.{}.lora_{}",
    "peft": "base_model.model.{}.lora_{}.weight",
    "peft, prefixed": "base_model.model.model.{}.lora_{}.weight",
}
R, ALPHA = 4, 8


@pytest.fixture
def base(make_base):
    return make_base(version="7", n_layer=2)


def pairs(model, form):
    generator = torch.Generator().manual_seed(3)
    found = {}
    for layer in range(len(model.blocks)):
        for name in LAYERS:
            rows, columns = model.get_parameter(f"blocks.{layer}.{name}.weight").shape
            for half, shape in (("A", (R, columns)), ("B", (rows, R))):
                found[form.format(f"blocks.{layer}.{name}", half)] = torch.randn(shape, generator=generator) * 0.1
    return found


def write(folder, tensors, form):
    folder.mkdir()
    if not form.startswith("base_model"):
        torch.save(tensors, folder / "rwkv-0.pth")
        return folder / "rwkv-0.pth"
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-1] for name in LAYERS})
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_logits_with_adapter_match_sum(tmp_path, make_model, base, form):
    model = make_model(version="7", n_layer=2)
    tensors = pairs(model, FORMS[form])
    trained = {name for name, _ in model.named_parameters() if NORM.search(name)} if FORMS[form] == PTH else ()
    norms = {name: torch.rand(16) for name in trained}
    path = write(tmp_path / "adapter", tensors | norms, FORMS[form])
    with torch.no_grad():
        for layer in range(2):
            for name in LAYERS:
                a, b = (tensors[FORMS[form].format(f"blocks.{layer}.{name}", half)] for half in "AB")
                model.get_parameter(f"blocks.{layer}.{name}.weight").add_(ALPHA / R * b @ a)
        for name, value in norms.items():
            model.get_parameter(name).copy_(value)
        expected = model.eval()(torch.arange(20)[None])[0]
        # an own .pth has no alpha
        tuned, _ = load_tuned(base, path, None if form.startswith("peft") else ALPHA)
        found = tuned.eval()(torch.arange(20)[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # fp32, different order of sums


@pytest.mark.parametrize("form", [PTH, FORMS["peft"]])
def test_training_continues(tmp_path, make_model, make_data, base, form):
    path = write(tmp_path / "adapter", pairs(make_model(version="7", n_layer=2), form), form)
    config = LoRAConfig(
        load_model=str(base),
        data_file=make_data(200),
        proj_dir=str(tmp_path / "run"),
        ctx_len=8,
        micro_bsz=1,
        max_steps=1,
        accelerator="cpu",
        lora_load=str(path),
        lora_r=R,
        lora_alpha=ALPHA,
        lora_parts="att,ffn",
        lr_init=0,
        lr_final=0,
    )
    made = read_tensors(fit(config).checkpoint)
    expected = pairs(make_model(version="7", n_layer=2), PTH)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)


def test_own_file_needs_alpha(tmp_path, make_model, base):
    path = write(tmp_path / "adapter", pairs(make_model(version="7", n_layer=2), PTH), PTH)
    with pytest.raises(UserError, match="its alpha is unknown"):
        load_tuned(base, path)


@pytest.mark.parametrize("name", ["init_lora.pth", "init_pissa.pth"])
def test_pissa_is_rejected(tmp_path, make_model, base, name):
    """Its file looks like LoRA; its initial matrices, subtracted from the base, are in another."""
    tensors = pairs(make_model(version="7", n_layer=2), PTH)
    path = write(tmp_path / "adapter", tensors, PTH)
    inspect_adapter(path, base, ALPHA)
    initial = {f"model.{key}".replace(".lora_", ".init_lora_"): value for key, value in tensors.items()}
    torch.save(initial, path.with_name(name))
    for file, words in ((path, f"an adapter of PiSSA .* {name} "), (path.with_name(name), "initial matrices of PiSSA")):
        with pytest.raises(UserError, match=f"{words}.*Merge .* with RWKV-PEFT"):
            inspect_adapter(file, base, ALPHA)


@pytest.mark.parametrize(("key", "kind"), [("bone", "BONE"), ("disha", "MISS"), ("miss", "SHIRA")])
def test_other_adapters_are_rejected_by_name(tmp_path, key, kind):
    torch.save({f"blocks.0.att.key.{key}": torch.zeros(R, 16)}, tmp_path / "rwkv-0.pth")
    with pytest.raises(UserError, match="an adapter of Bone, DiSHA or MiSS .*Merge it with RWKV-PEFT"):
        inspect_adapter(tmp_path / "rwkv-0.pth", alpha=ALPHA)
    folder = write(tmp_path / "peft", {f"base_model.model.blocks.0.att.key.{key}": torch.zeros(R, 16)}, FORMS["peft"])
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": R}))
    with pytest.raises(UserError, match=f"an adapter of (type '{kind}'|Bone, DiSHA or MiSS)"):
        inspect_adapter(folder)
