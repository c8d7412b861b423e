"""Runs of RWKV-5.2, 6 and 7: resuming, documents, chunks, precision, a new base, stages."""

import pytest
import torch

from rwkv.checkpoint import load_model, read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.train.fit import fit
from tests.train.small_runs import assert_same_tensors, losses

RUN = {
    "ctx_len": 16,
    "micro_bsz": 2,
    "epoch_steps": 6,
    "epoch_count": 2,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "fp32",
}
SIZES = {"n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": 50}


@pytest.fixture(params=["5.2", "6", "7"])
def new(request):
    """Flags of a new model."""
    return {**SIZES, "version": request.param}


@pytest.mark.parametrize("kind", [TrainConfig, LoRAConfig])
def test_resumed_run_matches_uninterrupted(make_data, tmp_path, kind, new):
    flags = {**RUN, **new, "data_file": make_data(400)}
    flags |= {"lora_parts": "att,ffn,time,ln", "lr_init": 1e-2} if kind is LoRAConfig else {}
    whole = fit(kind(**flags, proj_dir=str(tmp_path / "whole")))
    fit(kind(**flags, proj_dir=str(tmp_path / "parts"), max_steps=5))
    parts = fit(kind(**flags, proj_dir=str(tmp_path / "parts")))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert_same_tensors(whole.checkpoint, parts.checkpoint)


@pytest.mark.parametrize("extra", [{}, {"doc_reset": 1, "doc_sep": 7}], ids=str)
def test_exact_chunks_match_whole_context(make_data, tmp_path, extra, new):
    flags = {**RUN, **new, **extra, "data_file": make_data(400), "lr_init": 1e-3}
    fit(TrainConfig(**flags, proj_dir=str(tmp_path / "whole")))
    fit(TrainConfig(**flags, proj_dir=str(tmp_path / "chunks"), tbptt_len=5, exact=True))
    # fp32 sums in other order, over 12 steps
    assert losses(tmp_path / "chunks") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    fit(TrainConfig(**flags, proj_dir=str(tmp_path / "recomputed"), grad_cp=1))
    assert losses(tmp_path / "recomputed") == losses(tmp_path / "whole")


def test_documents_and_mask(make_data, tmp_path, new):
    flags = {**RUN, **new, "data_file": make_data(600), "doc_sep": 7, "min_ctx_len": 4}
    fit(TrainConfig(**flags, proj_dir=str(tmp_path / "run"), doc_training=1))
    found = losses(tmp_path / "run")
    assert len(found) == 12
    assert found[-1] < found[0]


def test_bf16_follows_fp32(make_data, tmp_path, new):
    flags = {**RUN, **new, "data_file": make_data(400), "lr_init": 1e-3}
    for precision in ("fp32", "bf16"):
        fit(TrainConfig(**flags | {"precision": precision}, proj_dir=str(tmp_path / precision)))
    # bf16 keeps 8 significant bits; 0.6 %, depending on the instructions of the CPU
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)


@pytest.mark.parametrize(("version", "low_rank"), [("6", "time_maa_w1"), ("7", "w1")])
def test_frozen_low_rank_matrices_keep_their_precision(make_base, make_data, tmp_path, version, low_rank):
    """Linear layers are stored in bf16; what `time` could train stays as in the base."""
    base, key = make_base(version=version, n_embd=32), f"blocks.1.att.{low_rank}"
    flags = {**RUN, "data_file": make_data(400), "load_model": str(base), "precision": "bf16", "lr_init": 0.0}
    fit(LoRAConfig(**flags | {"lr_final": 0.0}, lora_parts="att,time", proj_dir=str(tmp_path / "run"), max_steps=1))
    adapter, weights = read_tensors(tmp_path / "run/rwkv-final.pth"), read_tensors(base)
    assert torch.equal(adapter[key], weights[key])


@pytest.mark.parametrize("version", ["4", "7"])
@pytest.mark.parametrize("parts", ["time", "att,ffn,time,ln"])
def test_fp32_run_on_bf16_base_computes_in_fp32(make_model, make_data, tmp_path, version, parts):
    base = {name: p.detach().bfloat16() for name, p in make_model(version=version).named_parameters()}
    torch.save(base, tmp_path / "base.pth")
    flags = {**RUN, "data_file": make_data(400), "load_model": str(tmp_path / "base.pth"), "lr_init": 1e-2}
    for dtype in ("fp32", "bf16"):
        fit(LoRAConfig(**flags, lora_parts=parts, lora_base=dtype, proj_dir=str(tmp_path / dtype), max_steps=4))
    assert losses(tmp_path / "bf16") == losses(tmp_path / "fp32")  # the same values, stored in bf16
    assert_same_tensors(tmp_path / "bf16/rwkv-final.pth", tmp_path / "fp32/rwkv-final.pth")


def test_stages(make_data, tmp_path, new):
    flags = {"ctx_len": 7, "micro_bsz": 8, "data_file": make_data(7 * 40400), "proj_dir": str(tmp_path / "run")}
    machine = {"accelerator": "cpu", "precision": "fp32", "random_seed": 0}
    fit(TrainConfig(**flags, **machine, **new, my_pile_stage=1))
    initial = load_model(tmp_path / "run/rwkv-init.pth")
    assert new["version"] == initial.version.NAME
    fit(TrainConfig(**flags, **machine, my_pile_stage=3, max_steps=2))
    assert len(losses(tmp_path / "run")) == 2
