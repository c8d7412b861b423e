"""Upstream's commands from their READMEs and scripts, with other paths and smaller models.

BlinkDL: the examples at the top of RWKV-v4neo/train.py, to which the README refers. Blealtan and
m8than: their READMEs. The converter: the README of json2binidx.
"""

import os
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

from rwkv import compat
from rwkv.checkpoint import read_manifest, read_tensors
from rwkv.cli import parse
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.data.binidx_writer import writer
from rwkv.errors import UserError
from rwkv.train.fit import fit
from rwkv.train.runtime import strategy

LORA = """--load_model BASE --proj_dir OUT --data_file BINIDX --data_type binidx
  --vocab_size 50277 --ctx_len 1024 --epoch_steps 1000 --epoch_count 1000 --epoch_begin 0 --epoch_save 5 --micro_bsz 2 ACCUMULATE
  --n_layer 24 --n_embd 1024 --pre_ffn 0 --head_qk 0 --lr_init 1e-4 --lr_final 1e-4 --warmup_steps 0 --beta1 0.9 --beta2 0.999 --adam_eps 1e-8
  --accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 0
  --lora --lora_r 8 --lora_alpha 16 --lora_dropout 0.01"""
COMMANDS = {
    "BlinkDL, dummy data": """--load_model "" --wandb "" --proj_dir "OUT" --data_file "" --data_type "dummy" --vocab_size 0
        --ctx_len 128 --epoch_steps 1000 --epoch_count 20 --epoch_begin 0 --epoch_save 10
        --micro_bsz 16 --n_layer 12 --n_embd 768 --pre_ffn 0 --head_qk 0
        --lr_init 6e-4 --lr_final 1e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
        --accelerator gpu --devices 1 --precision bf16 --strategy ddp_find_unused_parameters_false --grad_cp 0""",
    "BlinkDL, 1.5B on eight GPUs": """--load_model "BASE" --wandb "" --proj_dir "OUT" --data_file "NUMPY" --data_type "numpy" --vocab_size 50277
        --ctx_len 1024 --epoch_steps 1000 --epoch_count 1000 --epoch_begin 0 --epoch_save 5
        --micro_bsz 8 --n_layer 24 --n_embd 2048 --pre_ffn 0 --head_qk 0
        --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.999 --adam_eps 1e-8
        --accelerator gpu --devices 8 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 0""",
    # a run without DeepSpeed between two with it must keep DeepSpeed's process groups
    "BlinkDL, enwik8": """--load_model "" --wandb "" --proj_dir "OUT" --data_file "TEXT" --data_type "utf-8" --vocab_size 0
        --ctx_len 512 --epoch_steps 5000 --epoch_count 500 --epoch_begin 0 --epoch_save 5
        --micro_bsz 12 --n_layer 6 --n_embd 512 --pre_ffn 0 --head_qk 0
        --lr_init 8e-4 --lr_final 1e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
        --accelerator gpu --devices 1 --precision bf16 --strategy ddp_find_unused_parameters_false --grad_cp 0""",
    "BlinkDL, 1.5B on one": """--load_model "BASE" --wandb "" --proj_dir "OUT" --data_file "NUMPY" --data_type "numpy" --vocab_size 50277
        --ctx_len 1024 --epoch_steps 200 --epoch_count 1000 --epoch_begin 0 --epoch_save 1
        --micro_bsz 11 --n_layer 24 --n_embd 2048 --pre_ffn 0 --head_qk 0
        --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.999 --adam_eps 1e-8
        --accelerator gpu --devices 1 --precision fp16 --strategy deepspeed_stage_2_offload --grad_cp 1""",
    "Blealtan": LORA.replace("ACCUMULATE", "--accumulate_grad_batches 4") + " --lora_parts=att,ffn,time,ln",
    "Blealtan, continuing": LORA.replace("ACCUMULATE", "--accumulate_grad_batches 4")
    + " --lora_load ADAPTER --lora_parts=att,ffn,time,ln",
    "m8than": LORA.replace("ACCUMULATE", "") + " --lora_parts=att,ffn,time,ln --seq_data 1 --seq_data_sep 0",
}
SIZES = {"version": "4", "n_layer": 2, "n_embd": 16}
# upper limit of ctx_len: seconds instead of minutes on CPUs without bf16 instructions
SHORT = 16


@pytest.fixture(scope="module", autouse=True)
def restored_process():
    """Remove the process group and environment variables that ddp and DeepSpeed leave behind."""
    before = dict(os.environ)
    yield
    if not strategy.deepspeed_was_used():
        strategy.leave_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Paths in the commands, by placeholder."""
    folder = tmp_path_factory.mktemp("upstream")
    ids = torch.randint(1, 50277, (15_000,), generator=torch.Generator().manual_seed(0)).tolist()
    np.save(folder / "train.npy", np.array(ids, dtype="uint16"))  # as prepare-data.py does
    with writer(folder / "d_text_document") as out:
        for begin in range(0, len(ids), SHORT - 1):
            out.add([*ids[begin : begin + SHORT - 1], 0])
    (folder / "enwik8").write_text("All good people read good books. " * 200)
    common = {
        "accelerator": "cpu",
        "precision": "fp32",
        "random_seed": 1,
        "ctx_len": 8,
        "micro_bsz": 1,
        "epoch_steps": 1,
        "epoch_count": 1,
    }
    common["data_file"] = str(folder / "d_text_document")
    base = fit(TrainConfig(**common, **SIZES, vocab_size=50277, proj_dir=str(folder / "base"))).checkpoint
    adapter = {
        "lora_parts": "att,ffn,time,ln",
        "lora_alpha": 16,
        "load_model": str(base),
        "proj_dir": str(folder / "adapter"),
    }
    adapter = fit(LoRAConfig(**common, **adapter)).checkpoint
    return {
        "BASE": base,
        "ADAPTER": adapter,
        "NUMPY": folder / "train.npy",
        "BINIDX": folder / "d_text_document",
        "TEXT": folder / "enwik8",
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_upstream_training_command(name, paths, tmp_path):
    line = COMMANDS[name]
    for word, path in {**paths, "OUT": tmp_path / "out"}.items():
        line = re.sub(rf"\b{word}\b", str(path), line)
    arguments, kind = shlex.split(line), LoRAConfig if "--lora" in line else TrainConfig
    config = parse(kind, "", arguments)
    known = {"head_qk": None, "seq_data": "doc_training_seq", "seq_data_sep": "doc_sep"}
    for word, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if (
            word.startswith("--")
            and not value.startswith("--")
            and (field := known.get(word[2:], word[2:]))
            and "=" not in word
        ):
            # the flag sets the field of its name
            assert getattr(config, field) == type(getattr(config, field))(value), word
    config = replace(config, **SIZES, devices=1, max_steps=1, random_seed=1, ctx_len=min(config.ctx_len, SHORT))
    if not torch.cuda.is_available():
        with pytest.raises(
            UserError, match="--accelerator gpu: torch sees no GPU; check nvidia-smi, or use --accelerator cpu"
        ):
            fit(config)
        config = replace(config, accelerator="auto")
    reason = None
    if "deepspeed" in config.strategy:
        reason = compat.why_deepspeed_unavailable(torch.cuda.is_available())
    if reason:
        with pytest.raises(UserError, match="--strategy ddp"):
            fit(replace(config, precision="fp32"))
        assert "--strategy ddp" in reason
        config = replace(config, strategy="ddp")
    if config.precision == "fp16" and not torch.cuda.is_available():
        with pytest.raises(UserError, match="fp16 needs a GPU; on a CPU use bf16 or fp32"):
            fit(config)
        config = replace(config, precision="bf16")
    result = fit(config)
    assert (result.steps, result.checkpoint.name) == (1, "rwkv-final.pth")
    vocabulary = read_manifest(result.checkpoint)["sizes"]["vocab_size"]
    # a new model predicts a uniform distribution
    assert result.first_loss == pytest.approx(np.log(vocabulary), rel=0.1)
    assert vocabulary == {"dummy": 13, "utf-8": 14}.get(config.data_type, 50277)
    assert any(".lora_A" in key for key in read_tensors(result.checkpoint)) == (kind is LoRAConfig)


def test_upstream_merge_command(script, paths, tmp_path):
    # README of RWKV-LM-LoRA: python3 merge_lora.py [--use-gpu] <lora_alpha> <base_model.pth>
    # <lora_checkpoint.pth> <output.pth>
    script("merge_lora.py", "16", paths["BASE"], paths["ADAPTER"], "output.pth")
    assert read_tensors(tmp_path / "output.pth").keys() == read_tensors(paths["BASE"]).keys()
    said = script("merge_lora.py", "16", paths["BASE"], paths["ADAPTER"], status=1).stderr
    assert "LORA_ALPHA BASE ADAPTER OUTPUT, in this order; there are 3" in said
    if not torch.cuda.is_available():
        assert (
            "no GPU"
            in script("merge_lora.py", "--use-gpu", "16", paths["BASE"], paths["ADAPTER"], "other.pth", status=1).stderr
        )


def test_upstream_20b_convert_command(script, write_jsonl, byte_tokenizer, tmp_path):
    path, ids = byte_tokenizer
    path.rename(tmp_path / "20B_tokenizer.json")
    write_jsonl({"text": "abc"}, {"text": "xyz"}, name="sample.jsonl")
    script("convert.py", *"--input ./sample.jsonl --output-prefix ./data/sample --vocab ./20B_tokenizer.json --dataset-impl mmap"
           " --tokenizer-type HFTokenizer --append-eod".split())  # fmt: skip
    assert Dataset(tmp_path / "data/sample_text_document").tokens.tolist() == [
        *(ids[x] for x in "abc"),
        0,
        *(ids[x] for x in "xyz"),
        0,
    ]
