"""Predicted memory with --bf16_copies, against torch's allocator."""

from dataclasses import replace

import pytest

from rwkv import compat
from rwkv.kernels.linear import Matrix
from rwkv.memory.estimate import estimate
from rwkv.memory.plan import Plan
from rwkv.models.version import VERSIONS, published
from tests.memory.test_estimate import assert_predicted, build, forward


@pytest.mark.parametrize(("version", "grad_cp"), [("4", False), ("7", True)])
def test_predicted_peak_with_bf16_copies(version, grad_cp):
    """They are kept, so the head's copy is not a temporary tensor of the loss."""
    plan = Plan(VERSIONS[version].Sizes(3, 256, 1024), lora=False, bf16_copies=True, grad_cp=grad_cp, gpu=False)
    plan = replace(plan, ctx_len=128)
    assert_predicted(plan)
    model = build(plan)
    forward(plan, model)
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, Matrix)]
    copies = sum(compat.storage(w.bf16_copy.tensor).nbytes() for w in matrices)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert estimate(plan).device["weights"] == stored + copies
    assert copies == 2 * sum(w.numel() for w in matrices)


def test_no_bf16_copies_where_none_are_read():
    plan = Plan(published("0.1b"), lora=False)
    for changed in (
        {"precision": "fp32"},
        {"optimizer": "adamw8bit"},
        {"lora": True},
        {"strategy": "deepspeed_stage_2"},
    ):
        other = replace(plan, **changed)
        assert estimate(replace(other, bf16_copies=True)) == estimate(other)
    assert estimate(replace(plan, bf16_copies=True)).total > estimate(plan).total
