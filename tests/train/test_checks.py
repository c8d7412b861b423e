"""Flags and data that cannot be trained with are rejected before the run starts."""

import re

import pytest
import torch

from rwkv.adapter_files import inspect_adapter
from rwkv.checkpoint import read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.data.binidx_writer import writer
from rwkv.errors import UserError
from rwkv.train.fit import fit
from tests.train.small_runs import SMALL, TUNE

INVALID_FLAGS = [
    ({"data_file": ""}, "--data_file is missing"),
    ({"data_file": "nothing"}, r"nothing.idx: no such file"),
    ({"ctx_len": 199}, r"has 200 tokens, but one sample of ctx_len 199 needs 201"),
    ({"ctx_len": 0}, "--ctx_len must be at least 1"),
    ({"vocab_size": 49}, r"token id 49 is outside the model's vocabulary of 49"),
    ({"accumulate_grad_batches": 3}, "--epoch_steps 4 must be a multiple of --accumulate_grad_batches 3"),
    ({"epoch_begin": 3}, "nothing to train"),
    ({"magic_prime": 7}, "the largest is 23"),
    ({"strategy": "deepspeed_stage_4"}, "not one of auto, ddp, .*did you mean deepspeed_stage_"),
    ({"micro_bsz": 1 << 31}, r"--micro_bsz must be less than 2\^31"),
    ({"n_layer": -1}, "--n_layer must not be negative"),
    ({"n_layer": 10**9}, "--n_layer must be at most 1,000; it is 1,000,000,000"),
    ({"n_embd": 10**9}, "--n_embd must be at most 262,144"),
    ({"vocab_size": 10**9}, "--vocab_size must be at most 16,777,216"),
    # the memory is predicted before anything is allocated
    ({"micro_bsz": 10**9}, r"this run needs about .* --micro_bsz 1000000000; .* that fits: .*--micro_bsz \d"),
    ({"ctx_len": 10**15}, r"this run needs about .*--ctx_len 1000000000000000, .* that fits: .*--ctx_len \d"),
    ({"n_embd": 1 << 18}, r"this run needs about .* D262144 .* use a smaller model"),
    ({"n_embd": 1 << 18, "my_pile_stage": 1}, r"this run needs about .* D262144"),
    ({"beta1": 1.0}, "less than 1"),
    ({"my_pile_shift": -2}, "--my_pile_shift must be at least 0"),
    ({"epoch_begin": 1}, "--epoch_begin 1 continues a run"),
    ({"load_model": "none.pth"}, "none.pth: no such checkpoint"),
    *([] if torch.cuda.is_available() else [({"accelerator": "gpu"}, "torch sees no GPU")]),
]


@pytest.mark.parametrize(("flags", "message"), INVALID_FLAGS)
def test_invalid_flags(make_data, tmp_path, flags, message):
    data = make_data(200)
    with pytest.raises(UserError, match=message):
        fit(TrainConfig(**{**SMALL, "data_file": data, "proj_dir": str(tmp_path / "run"), **flags}))
    assert not (tmp_path / "run").exists()


INVALID_LORA_FLAGS = [
    ({"load_model": ""}, "LoRA needs a pretrained model"),
    ({"lora_parts": "att,emb"}, "LoRA parts are any of"),
    ({"lora_r": 0}, "at least 1"),
    ({"lora_r": 10**12}, "this run needs about .* GB of memory"),
    ({"lora_load": "none.pth"}, "none.pth: no such checkpoint"),
    ({"n_embd": 32}, r"--n_embd 32, but it has 16. Sizes come from the checkpoint"),
]


@pytest.mark.parametrize(("flags", "message"), INVALID_LORA_FLAGS)
def test_invalid_lora_flags(make_base, make_data, tmp_path, flags, message):
    base, data = make_base(), make_data(200)
    with pytest.raises(UserError, match=message):
        fit(
            LoRAConfig(
                **{**TUNE, "load_model": str(base), "data_file": data, "proj_dir": str(tmp_path / "run"), **flags}
            )
        )


def test_lora_load_mismatch(make_base, make_data, tmp_path):
    base, data = make_base(), make_data(200)
    common = {**TUNE, "data_file": data, "load_model": str(base)}
    adapter = fit(LoRAConfig(**common, proj_dir=str(tmp_path / "a"))).checkpoint
    other = make_base("other.pth", seed=3)
    with pytest.raises(UserError, match="adapter of another base"):
        fit(LoRAConfig(**common | {"load_model": str(other)}, proj_dir=str(tmp_path / "b"), lora_load=str(adapter)))
    with pytest.raises(UserError, match="was trained with alpha 32, but --lora_alpha is 16"):
        fit(LoRAConfig(**common, proj_dir=str(tmp_path / "b"), lora_load=str(adapter), lora_alpha=16))
    with pytest.raises(UserError, match="has rank 8, but --lora_r is 4"):
        fit(LoRAConfig(**common, proj_dir=str(tmp_path / "b"), lora_load=str(adapter), lora_r=4))
    assert not (tmp_path / "b").exists()


def test_alpha_of_the_message_is_accepted(make_base, make_data, tmp_path):
    """Of an rsLoRA adapter it has more digits than a flag."""
    common = {**TUNE, "data_file": make_data(200), "load_model": str(make_base()), "max_steps": 1}
    adapter = str(fit(LoRAConfig(**common, proj_dir=str(tmp_path / "a"), use_rslora=True)).checkpoint)
    for i, rslora in enumerate((False, True)):
        flags = {**common, "proj_dir": str(tmp_path / f"{i}"), "lora_load": adapter, "use_rslora": rslora}
        with pytest.raises(UserError, match=r"Use --lora_alpha [\d.]+, or") as error:
            fit(LoRAConfig(**flags, lora_alpha=16))
        alpha = float(re.search(r"Use --lora_alpha ([\d.]+),", str(error.value))[1])
        assert fit(LoRAConfig(**flags, lora_alpha=alpha)).steps == 1
    with pytest.raises(UserError, match=r"omit alpha, or use [\d.]+$") as error:
        inspect_adapter(adapter, alpha=16)
    inspect_adapter(adapter, alpha=float(str(error.value).split()[-1]))


def test_negative_token_id(tmp_path):
    with writer(tmp_path / "d", "int32") as out:
        out.add([1] * 100)
    raw = bytearray((tmp_path / "d.bin").read_bytes())
    raw[40:44] = b"\xff" * 4
    (tmp_path / "d.bin").write_bytes(raw)
    with pytest.raises(UserError, match="token id -1 is outside the model's vocabulary of 50"):
        fit(TrainConfig(**SMALL, data_file=str(tmp_path / "d"), proj_dir=str(tmp_path / "run")))


def test_lora_load_without_matrices(make_base, make_data, tmp_path):
    common = {**TUNE, "load_model": str(make_base()), "data_file": make_data(200), "lora_parts": "time,ln"}
    first = fit(LoRAConfig(**common, proj_dir=str(tmp_path / "a")))
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
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
