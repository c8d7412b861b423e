"""The linear layer against torch's, and its saved activations."""

import pytest
import torch
import torch.nn.functional as F

from rwkv.kernels.elementwise import native
from rwkv.kernels.linear import Matrix, linear

SHAPES = [(1, 3, 5), (7, 33, 65), (40, 200, 300), (300, 512, 96)]  # rows, out, in; the large ones use oneDNN


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_matches_torch_linear(shape, dtype):
    rows, out_features, in_features = shape
    torch.manual_seed(0)
    x, weight, g = (
        torch.randn(2, rows, in_features),
        torch.randn(out_features, in_features),
        torch.randn(2, rows, out_features),
    )
    ours = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    truth = [t.detach().double().requires_grad_() for t in ours]
    y, expected = linear(*ours), F.linear(*truth)
    y.backward(g.to(dtype))
    expected.backward(g.to(dtype).double())
    theirs = [t.detach().requires_grad_() for t in ours]
    torch_y = F.linear(*theirs)
    torch_y.backward(g.to(dtype))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-14}[dtype]
    # torch 1.13.1 rounds partial sums to bf16 on CPUs without AVX-512, hence the factor of torch's
    # own error.
    for a, b, t in (
        (y, expected, torch_y),
        (ours[0].grad, truth[0].grad, theirs[0].grad),
        (ours[1].grad, truth[1].grad, theirs[1].grad),
    ):
        assert bool((a.double() - b).abs().max() <= tolerance * b.abs().max() + 2 * (t.double() - b).abs().max())


def test_deterministic():
    torch.manual_seed(0)
    x, weight = torch.randn(300, 96, requires_grad=True), torch.randn(512, 96, requires_grad=True)
    twice = [(linear(x, weight), *torch.autograd.grad(linear(x, weight).sin().sum(), (x, weight))) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def saved_tensors(run) -> list[torch.Tensor]:
    """Tensors saved for the backward pass."""
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        run()
    return tensors


def test_frozen_layer_saves_weight_only():
    layer, x = Matrix(8, 16, bias=False), torch.randn(2, 5, 8, requires_grad=True)
    layer.weight.requires_grad_(False)
    assert [t.data_ptr() for t in saved_tensors(lambda: layer(x))] == [layer.weight.data_ptr()]


def test_trained_layer_recomputes_input():
    layer, k = Matrix(8, 16, bias=False), torch.randn(2, 5, 8, requires_grad=True)
    torch.nn.init.normal_(layer.weight)  # a new Matrix is uninitialised
    x = native.relu2(k)
    found = {t.data_ptr() for t in saved_tensors(lambda: layer(x))}
    assert found == {layer.weight.data_ptr(), k.data_ptr()}
    plain = torch.autograd.grad(F.linear(torch.relu(k).square(), layer.weight).sin().sum(), (k, layer.weight))
    ours = torch.autograd.grad(layer(x).sin().sum(), (k, layer.weight))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # fp32, different summation order


def test_autocast_bf16_with_fp32_gradients():
    layer, x = Matrix(40, 50, bias=False), torch.randn(3, 9, 40, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
