"""recompute.checkpointed has the values and gradients of autograd, and recomputes results instead
of saving them.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rwkv.kernels.elementwise.recompute import checkpointed
from rwkv.kernels.linear import linear
from rwkv.models.layers import Norm


def product(x, y, scale):
    return torch.tanh(x) * y if scale is None else torch.tanh(x) * y * scale


def inputs(scale=True):
    x, y, s = (torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    return [x, y, s[0] if scale else None]


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True)], ids=str)
def test_gradients_match_autograd(scale, wanted):
    results = []
    for run in (product, lambda *inputs: checkpointed(product, *inputs)):
        leaves = [
            None if t is None else t.clone().requires_grad_(want) for t, want in zip(inputs(scale), wanted, strict=True)
        ]
        y = run(*leaves)
        y.square().sum().backward()
        results.append([y.detach(), *(None if t is None else t.grad for t in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)  # the same operations


def test_no_gradient_wanted():
    y = checkpointed(product, *inputs())
    assert not y.requires_grad
    assert torch.equal(y, product(*inputs()))


def test_only_inputs_are_saved():
    """A norm and two cheap functions before a linear layer save only the first inputs."""
    norm, weight = Norm(5), nn.Parameter(torch.randn(4, 5))
    x, y, s = (t.requires_grad_() for t in inputs())
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        middle = checkpointed(product, norm(x), y, s)
        out = linear(checkpointed(F.silu, middle), weight)
    large = {pointer for pointer, t in saved.items() if t.numel() == 15}
    assert large == {x.data_ptr(), y.data_ptr()}
    found = torch.autograd.grad(out.sin().sum(), [x, y, s, weight])
    exact = F.linear(F.silu(product(F.layer_norm(x, (5,)), y, s)), weight)
    for ours, theirs in zip(found, torch.autograd.grad(exact.sin().sum(), [x, y, s, weight]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # fp32 rounding
