"""Tensors that backward passes recompute: how often, and when they are freed."""

import weakref

import pytest
import torch
from torch import nn

from rwkv.kernels.elementwise import native
from rwkv.kernels.elementwise.recompute import recomputed
from rwkv.kernels.linear import linear
from rwkv.models import RWKV, v4
from rwkv.models.version import VERSIONS


def run(several_uses: bool, times: int = 1):
    """Two linear layers of tanh(x): results of its recomputation, and the gradients."""
    x, a, b = (torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    x, a, b = x.requires_grad_(), nn.Parameter(a), nn.Parameter(b)
    found = []

    def tanh(x):
        found.append(torch.tanh(x))
        return found[-1]

    y = recomputed(torch.tanh(x), tanh, x, several_uses=several_uses)
    out = (linear(y, a) * linear(y, b)).sum()
    for _ in range(times):
        out.backward(retain_graph=times > 1)
    return found, [t.grad for t in (x, a, b)], y


def test_several_uses_recompute_once():
    (once, gradients, _), (twice, expected, _) = run(True), run(False)
    assert (len(once), len(twice)) == (1, 2)
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))  # the same operations


def test_result_is_freed_after_the_last_use():
    found, _, y = run(True)  # y, and with it the graph, still exists
    (result,) = map(weakref.ref, found)
    found.clear()
    assert result() is None
    assert y.recompute is not None


def test_second_backward_pass_recomputes_again():
    found, gradients, _ = run(True, times=2)
    assert len(found) == 2
    assert all(torch.equal(g, 2 * e) for g, e in zip(gradients, run(False)[1], strict=True))


@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_norms_and_wkv_of_a_block_once(monkeypatch, version, grad_cp):
    """With all weights trained; after a frozen embedding block 0 would recompute its norms at each
    use.
    """
    calls = {"norm": 0, "wkv": 0}

    def counted(name, function):
        def wrapper(*args):
            calls[name] += 1
            return function(*args)

        return wrapper

    monkeypatch.setattr(native, "_norm", counted("norm", native._norm))
    monkeypatch.setattr(v4, "_wkv4", counted("wkv", v4._wkv4))
    model = RWKV(VERSIONS[version].Sizes(3, 64, vocab_size=50), grad_cp)
    model.initialise(1e-2)
    hidden, _ = model.train().hidden(torch.randint(50, (2, 20)))
    calls.update(norm=0, wkv=0)
    hidden.square().sum().backward()
    assert calls["norm"] == 2 * 3  # ln1 and ln2 of three blocks
    assert calls["wkv"] == (3 * (1 + grad_cp) if version == "4" else 0)  # checkpointing computes it again first
