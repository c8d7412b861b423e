"""Exported models load in transformers and give the same logits."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import RwkvForCausalLM

from rwkv.checkpoint import load_model, read_tensors

TOKENS = torch.arange(1, 30)[None]


def test_transformers_loads_export(script, make_base, tmp_path):
    base = make_base(n_layer=3, dim_att=24, dim_ffn=40)
    result = script("export.py", "--model", base, "--output", "hf")
    assert float(re.search(r"difference from .* (\S+) \(", result.stdout)[1]) < 1e-4  # fp32 rounding
    theirs = RwkvForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        logits = theirs(TOKENS, use_cache=False).logits
        expected = load_model(base).eval()(TOKENS)[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # fp32, different summation order
    assert (theirs.config.attention_hidden_size, theirs.config.intermediate_size) == (24, 40)
    assert (
        "hf/model.safetensors already exists" in script("export.py", "--model", base, "--output", "hf", status=1).stderr
    )


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_dtype_flag(script, make_base, tmp_path, name):
    base = make_base()
    script("export.py", "--model", base, "--output", name, "--dtype", "bf16")
    written, original = read_tensors(tmp_path / name), read_tensors(base)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key].bfloat16()) for key in original)


def test_fp16_overflow(script, make_base, tmp_path):
    base = make_base()
    tensors = read_tensors(base)
    tensors["head.weight"][0, 0] = 1e5
    torch.save(tensors, tmp_path / "large.pth")
    assert (
        "head.weight is not finite in fp16"
        in script("export.py", "--model", "large.pth", "--output", "x.pth", "--dtype", "fp16", status=1).stderr
    )
    assert not (tmp_path / "x.pth").exists()


def test_pre_ffn_not_exportable(script, make_base, tmp_path):
    base = make_base(pre_ffn=True)
    assert "does not support --pre_ffn 1" in script("export.py", "--model", base, "--output", "hf", status=1).stderr
    assert not (tmp_path / "hf").exists()


def test_export_does_not_import_transformers():
    program = "import sys; from rwkv import export; print('transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )
