"""Upstream's initial weights, against a second implementation from their description."""

import math

import pytest
import torch

from rwkv.models import RWKV
from rwkv.models.v4 import Sizes


def fresh(layers=3, D=8, A=12, F=40, V=100, scale=6e-4, pre_ffn=False) -> RWKV:
    torch.manual_seed(0)
    model = RWKV(Sizes(layers, D, V, A, F, pre_ffn))
    model.initialise(scale)
    return model


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_time_parameters(layers):
    D, A = 8, 12
    for layer, block in enumerate(fresh(layers, D, A).blocks):
        r = layer / (layers - 1) if layers > 1 else 0
        s = 1 - layer / layers
        decay = [-5 + 8 * (h / (A - 1)) ** (0.7 + 1.3 * r) for h in range(A)]
        first = [math.log(0.3) + 0.5 * ((i + 1) % 3 - 1) for i in range(A)]
        x = [i / D for i in range(D)]
        expected = {
            "att.time_decay": decay,
            "att.time_first": first,
            "att.time_mix_k": [v**s for v in x],
            "att.time_mix_v": [v**s + 0.3 * r for v in x],
            "att.time_mix_r": [v ** (s / 2) for v in x],
            "ffn.time_mix_k": [v**s for v in x],
            "ffn.time_mix_r": [v**s for v in x],
        }
        for name, values in expected.items():
            found = block.get_parameter(name).flatten()
            torch.testing.assert_close(found, torch.tensor(values), rtol=1e-6, atol=1e-6)  # fp32


def test_matrices_zero_or_orthogonal():
    model = fresh(2, D=8, A=12, F=40, V=100)
    gains = {"att.value": math.sqrt(12 / 8), "ffn.key": math.sqrt(40 / 8)}
    for block in model.blocks:
        for name in ("att.key", "att.receptance", "att.output", "ffn.value", "ffn.receptance"):
            assert not block.get_submodule(name).weight.any(), name
        for name, gain in gains.items():
            assert_orthogonal_columns(block.get_submodule(name).weight, gain)
    assert_orthogonal_columns(model.head.weight, 0.5 * math.sqrt(100 / 8))


def assert_orthogonal_columns(weight, gain):
    """W, with more rows than columns, is orthogonal: WᵀW = gain² I."""
    torch.testing.assert_close(
        weight.t() @ weight, gain**2 * torch.eye(weight.shape[1]), rtol=1e-4, atol=1e-4
    )  # fp32 QR


def test_orthogonal_gain_of_narrow_matrices():
    model = fresh(1, D=16, A=16, V=10)
    value, head = model.blocks[0].att.value.weight, model.head.weight
    torch.testing.assert_close(value @ value.t(), torch.eye(16), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head @ head.t(), 0.25 * torch.eye(10), rtol=1e-4, atol=1e-4)


def test_embedding_scale():
    weight = fresh(V=5000, scale=6e-4).emb.weight.detach()
    assert float(weight.abs().max()) <= 6e-4
    assert float(weight.std()) == pytest.approx(6e-4 / math.sqrt(3), rel=0.02)  # of a uniform; 40 000 draws


def test_layer_norms():
    model = fresh(pre_ffn=True)
    for name, p in model.named_parameters():
        if ".ln" in name or name.startswith("ln_out"):
            assert bool((p == (1 if name.endswith("weight") else 0)).all()), name
