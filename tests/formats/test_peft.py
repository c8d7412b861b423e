"""Adapter folders: read by peft's PeftModel on transformers' RWKV-4 and rwkv7-hf's RWKV-7."""

import json

import peft
import pytest
import torch
import transformers

from rwkv import adapter_files, checkpoint
from rwkv.adapter_files import inspect_adapter, load_tuned
from rwkv.adapters import lora
from rwkv.config import ExportConfig
from rwkv.errors import UserError
from rwkv.export import DTYPES
from tests.formats.oracle import ask, script_main
from tests.oracle import needs_oracle

IDS = list(range(1, 30))
RWKV7_HF = """
import json, sys, torch
from peft import PeftModel
sys.path.insert(0, sys.argv[1])
from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM
base, adapter, ids = map(json.loads, sys.argv[2:])
model = PeftModel.from_pretrained(RWKV7ForCausalLM.from_pretrained(base, torch_dtype=torch.float32), adapter).eval()
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].tolist()))
"""


def adapter_of(base, path, parts=("att", "ffn"), alpha=12.0, dora=False):
    """Write a random adapter on a base."""
    model = checkpoint.load_model(base)
    torch.manual_seed(1)  # making the base, at its first use, has drawn numbers
    lora.inject(model, parts, 4, alpha, dora=dora)
    with torch.no_grad():
        for name in lora.adapter_names(model, parts):
            model.get_parameter(name).add_(torch.randn(model.get_parameter(name).shape) * 0.1)
    adapter_files.save_adapter(path, model, {"r": 4, "alpha": alpha, "parts": [*parts], "base": str(base)}, {})
    return path


def exported(base, folder, dora=False):
    adapter = adapter_of(base, folder / "adapter.pth", dora=dora)
    script_main()(ExportConfig(lora=str(adapter), output=str(folder / "peft"), format="peft"))
    script_main()(ExportConfig(model=str(base), output=str(folder / "hf"), check_tokens=0))
    with torch.no_grad():
        logits = load_tuned(base, adapter)[0](torch.tensor([IDS]))[0][0]
        assert float((logits - checkpoint.load_model(base)(torch.tensor([IDS]))[0][0]).abs().max()) > 0.1
    found, known = inspect_adapter(folder / "peft")
    assert (known["r"], known["alpha"]) == (4, 12)
    expected = checkpoint.read_tensors(adapter)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return logits


@pytest.mark.parametrize("dora", [False, True])
def test_peft_adapts_transformers_rwkv4(model_file, tmp_path, dora):
    logits = exported(model_file("4"), tmp_path, dora)
    theirs = transformers.RwkvForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "peft")).eval()
    with torch.no_grad():
        found = theirs(torch.tensor([IDS]), use_cache=False).logits[0]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)  # fp32, different order of sums


@needs_oracle
@pytest.mark.parametrize("dora", [False, True])
def test_peft_adapts_rwkv7_hf(model_file, tmp_path, dora):
    logits = exported(model_file("7"), tmp_path, dora)
    found = ask(RWKV7_HF, str(tmp_path / "hf"), str(tmp_path / "peft"), IDS)
    torch.testing.assert_close(torch.tensor(found), logits, rtol=1e-4, atol=1e-4)  # as above
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    layers = ["attn.k_proj", "attn.o_proj", "attn.r_proj", "attn.v_proj", "ffn.key", "ffn.value"]
    assert config["target_modules"] == layers


def test_adapters_that_peft_cannot_hold(model_file, tmp_path):
    adapter = adapter_of(model_file("7"), tmp_path / "adapter.pth", ("att", "time"))
    with pytest.raises(UserError, match=r"the adapter also trains blocks.0.att.\w+, which peft's adapters cannot hold"):
        script_main()(ExportConfig(lora=str(adapter), output=str(tmp_path / "peft"), format="peft"))
    for flags, message in (
        ({"state": "state.pth"}, "--format peft cannot store --state state.pth"),
        ({"dtype": "q8_0"}, "--dtype q8_0: peft files cannot hold it"),
        ({"max_shard_gb": -1}, "--max_shard_gb must be greater than 0; it is -1"),
    ):
        with pytest.raises(UserError, match=message):
            script_main()(ExportConfig(lora=str(adapter), output=str(tmp_path / "peft"), format="peft", **flags))
    assert not (tmp_path / "peft").exists()
    with pytest.raises(UserError, match="--format peft writes an adapter: pass it as --lora"):
        script_main()(ExportConfig(model=str(model_file("7")), output=str(tmp_path / "peft"), format="peft"))


def test_dtype_of_the_adapter(model_file, tmp_path, capsys):
    adapter = adapter_of(model_file("4"), tmp_path / "adapter.pth")
    for dtype, largest in (("bf16", 2e-3), ("fp32", 0.0)):  # weights of up to 0.5, 8 bits
        output = tmp_path / dtype
        script_main()(ExportConfig(lora=str(adapter), output=str(output), format="peft", dtype=dtype))
        found, original = inspect_adapter(output)[0], checkpoint.read_tensors(adapter)
        assert all(torch.equal(tensor, original[name].to(DTYPES[dtype])) for name, tensor in found.items())
        difference = max(float((tensor.float() - original[name]).abs().max()) for name, tensor in found.items())
        assert difference <= largest
        assert f"largest difference from {adapter}: weights {difference:.2e}" in capsys.readouterr().out
