"""LoRA on a quantised base (--lora_base nf4, int8): against bf16, resuming, merging, memory, errors."""

import pytest
import torch

from rwkv import checkpoint, merge
from rwkv.adapter_files import load_tuned
from rwkv.config import LoRAConfig, PretrainConfig
from rwkv.data.binidx_writer import writer
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.kernels import quant
from rwkv.memory import machine
from rwkv.models.version import VERSIONS
from rwkv.train.fit import fit
from tests.train.small_runs import TUNE, lines

COMMON = {"ctx_len": 32, "micro_bsz": 8, "accelerator": "cpu", "precision": "fp32", "random_seed": 1, "magic_prime": -1}
TUNED = {**COMMON, "lora_r": 8, "lora_parts": "att,ffn,ln,time", "lora_dropout": 0.0, "lr_init": 5e-3, "lr_final": 1e-3}


def write_text(prefix, jump, seed):
    """Tokens that count upwards by 1 or `jump`, chosen by the last token, with some noise."""
    generator, token, tokens = torch.Generator().manual_seed(seed), 0, []
    for noise in torch.rand(6000, generator=generator).tolist():
        token = int(noise * 4000) % 40 if noise < 0.05 else (token + (jump if token % 3 == 0 else 1)) % 40
        tokens.append(token)
    with writer(prefix) as out:
        out.add(tokens)
    return str(prefix)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained base, and data that differs from its own."""
    folder = tmp_path_factory.mktemp("trained")
    sizes = {"version": "7", "n_layer": 2, "n_embd": 64, "head_size": 32, "vocab_size": 50}
    flags = {"data_file": write_text(folder / "a", 7, 0), "proj_dir": str(folder / "base"), "lr_init": 3e-3, "lr_final": 1e-3}
    result = fit(PretrainConfig(**COMMON, **sizes, **flags, epoch_steps=120, epoch_count=1))
    assert result.last_loss < 0.6 * result.first_loss
    return {"load_model": str(result.checkpoint), "data_file": write_text(folder / "b", 11, 1)}


@pytest.fixture(scope="module")
def curves(trained, tmp_path_factory):
    """LoRA runs on the trained base, by --lora_base: results and losses of each step."""
    found = {}
    for base in ("bf16", "int8", "nf4"):
        folder = tmp_path_factory.mktemp(base)
        flags = LoRAConfig(**TUNED, **trained, lora_base=base, epoch_steps=60, epoch_count=1, proj_dir=str(folder / "run"))
        result = fit(flags)
        found[base] = flags, result, [line["loss"] for line in lines(folder / "run")]
    return found


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_final_loss_within_a_percent_of_bf16(curves, base):
    (_, expected, reference), (_, found, losses) = curves["bf16"], curves[base]
    assert expected.last_loss < 0.8 * expected.first_loss
    assert found.last_loss == pytest.approx(expected.last_loss, rel=0.01)
    assert losses != reference
    assert losses == pytest.approx(reference, rel=0.05)


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_resumes_bit_for_bit(trained, tmp_path, base):
    flags = {**TUNED, **trained, "lora_base": base, "lora_dropout": 0.1, "epoch_steps": 2, "micro_bsz": 2}
    whole = fit(LoRAConfig(**flags, epoch_count=2, proj_dir=str(tmp_path / "whole")))
    fit(LoRAConfig(**flags, epoch_count=1, proj_dir=str(tmp_path / "parts"), lr_final=TUNED["lr_final"]) if False else
        LoRAConfig(**flags, epoch_count=2, max_steps=0, my_exit=1, proj_dir=str(tmp_path / "parts")))
    parts = fit(LoRAConfig(**flags, epoch_count=2, proj_dir=str(tmp_path / "parts"), allow_changes=True))
    ours, theirs = (checkpoint.read_tensors(result.checkpoint) for result in (parts, whole))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
