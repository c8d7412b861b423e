"""The loss of an optimizer step is the mean over all targets of the global batch, however the batch
is divided.
"""

import math

import pytest
import torch

from rwkv.checkpoint import read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.data.binidx import mask_path
from rwkv.data.binidx_writer import writer
from rwkv.train.fit import fit
from tests.train.small_runs import lines

TOLERANCE = 1e-5  # fp32, different summation order
STEPS = 4
# No clipping and a large ε: clipping or Adam's normalisation would hide a wrong gradient scale.
FLAGS = {
    "ctx_len": 12,
    "epoch_count": 1,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "fp32",
    "lr_init": 1e-2,
    "lr_final": 1e-3,
}
FLAGS |= {"grad_clip": 0.0, "adam_eps": 1e-2}
VARIANTS = {
    "masked": {"magic_prime": -1},
    "masked at random offsets": {},
    "masked with resets": {"doc_reset": 1},
    "padded": {"doc_training": 1},
    "padded with resets, in order": {"doc_training_seq": 1, "doc_reset": 1},
    "chunks": {"tbptt_len": 5},
    "exact chunks with resets": {"tbptt_len": 5, "exact": True, "doc_reset": 1},
    "skip": {"on_nan": "skip"},
}


@pytest.fixture
def masked(tmp_path):
    """A binidx of 90 documents that end with 0. One target, all targets or no target of a document
    contribute to the loss.
    """
    generator = torch.Generator().manual_seed(5)
    mask = []
    with writer(tmp_path / "d_text_document") as out:
        for i in range(90):
            length = int(torch.randint(2, 13, (1,), generator=generator))
            out.add([*torch.randint(1, 50, (length - 1,), generator=generator).tolist(), 0])
            mask += [i % 3 == 0 or (i % 3 == 1 and t == 1) for t in range(length)]
    mask_path(tmp_path / "d_text_document").write_bytes(bytes(mask))
    return str(tmp_path / "d_text_document")


def assert_same_steps(one, other):
    """Assert that two runs took the same steps."""
    assert [line["step"] for line in lines(other)] == [*range(1, STEPS + 1)]
    for key in ("loss", "targets", "grad_norm", "lr", "val_loss"):
        ours, theirs = (
            [math.nan if line[key] is None else line[key] for line in lines(run) if key in line] for run in (one, other)
        )
        assert theirs == pytest.approx(ours, rel=TOLERANCE, abs=1e-7, nan_ok=True), key
    ours, theirs = read_tensors(one / "rwkv-0.pth"), read_tensors(other / "rwkv-0.pth")
    for key in ours:
        torch.testing.assert_close(theirs[key], ours[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    ("kind", "variant"), [*((TrainConfig, name) for name in VARIANTS), (LoRAConfig, "masked"), (LoRAConfig, "padded")]
)
def test_accumulation_matches_single_batch(make_base, masked, tmp_path, kind, variant):
    flags = FLAGS | VARIANTS[variant] | {"load_model": str(make_base()), "data_file": masked}
    flags |= {"lora_dropout": 0.0} if kind is LoRAConfig else {}
    for k in (1, 2, 4):
        fit(
            kind(
                **flags,
                micro_bsz=4 // k,
                accumulate_grad_batches=k,
                epoch_steps=k * STEPS,
                proj_dir=str(tmp_path / f"{k}"),
            )
        )
    targets = [line["targets"] for line in lines(tmp_path / "1")]
    assert len(set(targets)) > 1
    assert_same_steps(tmp_path / "1", tmp_path / "2")
    assert_same_steps(tmp_path / "1", tmp_path / "4")


def test_micro_batches_without_targets(make_base, masked, tmp_path):
    size = mask_path(masked).stat().st_size
    mask_path(masked).write_bytes(bytes(i // 25 % 2 for i in range(size)))  # some samples have no target
    flags = FLAGS | {"load_model": str(make_base()), "data_file": masked, "doc_training_seq": 1, "min_ctx_len": 12}
    for k in (1, 2):
        fit(
            TrainConfig(
                **flags,
                micro_bsz=2 // k,
                accumulate_grad_batches=k,
                epoch_steps=k * STEPS,
                proj_dir=str(tmp_path / f"{k}"),
            )
        )
    assert {line["targets"] > 0 for line in lines(tmp_path / "1")} == {True, False}
    assert all((line["loss"] is None) == (line["targets"] == 0) for line in lines(tmp_path / "1"))
    assert_same_steps(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize(("variant", "val_samples"), [("masked with resets", 7), ("padded", 0)])
def test_two_processes_match_one(two_ranks, make_base, masked, tmp_path, variant, val_samples):
    """Including a validation set with an odd number of samples: one rank has more batches than the
    other.
    """
    flags = (
        FLAGS
        | VARIANTS[variant]
        | {"load_model": make_base(), "data_file": masked, "val_split": 0.3, "val_every": 1, "val_samples": val_samples}
    )
    arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
    fit(
        TrainConfig(
            **flags | {"load_model": str(flags["load_model"])},
            micro_bsz=4,
            epoch_steps=STEPS,
            proj_dir=str(tmp_path / "one"),
        )
    )
    two_ranks(
        "finetune.py",
        *arguments,
        "--micro_bsz",
        1,
        "--accumulate_grad_batches",
        2,
        "--epoch_steps",
        2 * STEPS,
        "--proj_dir",
        tmp_path / "two",
    )
    assert all(line["val_loss"] > 0 for line in lines(tmp_path / "one"))
    assert_same_steps(tmp_path / "one", tmp_path / "two")
