"""The fused operations against plain formulas of torch, values and gradients, with every vector width."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv.model import eager, fused, plain

STREAMS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]  # residual stream, inside
WIDTHS = st.sampled_from(["baseline", "avx2", "avx512", "avx512_bf16", "torch"])  # the last: without the compiled unit
SIZES = st.sampled_from([1, 3, 16, 31, 32, 33, 64, 100, 257])


@pytest.fixture(autouse=True)
def unit():
    """The compiled unit, and not its absence, is what is tested; whatever width a test took, the widest is back after it."""
    assert fused._unit(torch.zeros(1)) is torch.ops.rwkv
    yield
    take("")


def take(width):
    fused._unit = COMPILED if width != "torch" else lambda *tensors: COMPILED(*tensors) and eager
    torch.ops.rwkv.cpu_vectors("" if width == "torch" else width)


COMPILED = fused._unit


def check(operation, formula, inputs, seed):
    """`operation` on `inputs` against `formula` on the same numbers in fp64: outputs, and gradients of a random combination of them."""
    generator = torch.Generator().manual_seed(seed)
    ours = [x.clone().requires_grad_(x.is_floating_point()) if x is not None else None for x in inputs]
    truth = [
        x.double().requires_grad_() if x is not None and x.is_floating_point() else x
        for x in (y.detach() if y is not None else None for y in ours)
    ]
    outputs, expected = operation(*ours), formula(*truth)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, weights)
    torch.autograd.backward(expected, [w.double() for w in weights])
    for y, e in zip(outputs, expected, strict=True):
        close(y, e)
    for x, e in zip(ours, truth, strict=True):
        if x is not None and x.is_floating_point():
            close(x.grad, e.grad)


def close(x, truth):
    """Within a rounding of what x is stored in: in bf16 of its own size (or a hundredth of the largest), in fp32 of the largest or of the terms, which
    are near 1, as sums may cancel."""
    share = 2**-8 if x.dtype == torch.bfloat16 else 2e-6
    assert x.shape == truth.shape
    limit = share * torch.maximum(truth.abs(), truth.abs().max().clamp_min(1) * (1e-2 if x.dtype == torch.bfloat16 else 1))
    assert bool(((x.double() - truth).abs() <= limit).all()), float(((x.double() - truth).abs() - limit).max().detach())


def normal(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(stream=st.sampled_from(STREAMS), width=WIDTHS, channels=SIZES.filter(lambda c: c > 9), seed=st.integers(0, 2**31))  # fewer cancel
def test_norm_is_layer_norm_and_adds_the_gradient_that_flows_past(stream, width, channels, seed):
    take(width)
    x, w, b = (
        normal((2, 19, channels), stream[0], seed) * 3 + 1,
        normal(channels, torch.float32, seed + 1),
        normal(channels, torch.float32, seed + 2),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=stream[0] != stream[1]):
        assert fused.norm(x, w, b, 1e-5)[0].dtype == stream[1]

    def ours(x, w, b):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=stream[0] != stream[1]):
            y, past = fused.norm(x, w, b, 1e-5)
        return y, past * 0.5

    check(ours, lambda x, w, b: (F.layer_norm(x, (channels,), w, b, 1e-5), x * 0.5), [x, w, b], seed)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), width=WIDTHS, channels=SIZES, length=st.sampled_from([1, 2, 19]),
    count=st.sampled_from([1, 2, 3]), reset=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_mix_is_token_shift(dtype, width, channels, length, count, reset, seed):
    take(width)
    x, last = normal((2, length, channels), dtype, seed), normal((2, channels), dtype, seed + 1)
    starts = normal((2, length), torch.float32, seed + 2) > 0.5 if reset else None
    weights = [torch.rand(1, 1, channels, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
    recipes = []

    def ours(x, last, *weights):
        made = fused.mix(x, last, starts, list(weights))
        recipes.extend(recipe for _, recipe in made)
        return tuple(y for y, _ in made)

    def formula(x, last, *weights):
        before = torch.stack([last if t == 0 else x[:, t - 1] for t in range(length)], 1)
        if starts is not None:
            before = before * ~starts[..., None]
        return tuple(x * m + before * (1 - m) for m in weights)

    check(ours, formula, [x, last, *weights], seed)
    for (y, _), recipe in zip(fused.mix(x, last, starts, weights), recipes, strict=True):
        assert torch.equal(recipe.function(*recipe.parts), y)  # formed again, it is the same


@settings(max_examples=30, deadline=None)
@given(stream=st.sampled_from(STREAMS), width=WIDTHS, count=SIZES, scale=st.sampled_from([1, 30, 300]), seed=st.integers(0, 2**31))
def test_gates_and_squared_relu(stream, width, count, scale, seed):
    take(width)
    r, v, past = (
        normal((3, count), stream[1], seed) * scale,
        normal((3, count), stream[1], seed + 1),
        normal((3, count), stream[0], seed + 2),
    )
    check(lambda r, v: (fused.gate(r, v)[0],), lambda r, v: (torch.sigmoid(r) * v,), [r, v], seed)
    check(lambda p, r, v: (fused.gate_onto(p, r, v),), lambda p, r, v: (p + torch.sigmoid(r) * v,), [past, r, v], seed)
    check(lambda k: (fused.relu2(k)[0],), lambda k: (torch.relu(k).square(),), [v], seed)
    for made, recipe in (fused.gate(r, v), fused.relu2(v)):
        assert torch.equal(recipe.function(*recipe.parts), made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_dropout_draws_the_same_with_any_width_and_without_the_unit(dtype, width):
    take(width)
    x = normal((7, 5003), dtype, 0) + 5
    for seed, p in ((0, 0.01), (12345, 0.5), (2**31 - 1, 0.9)):
        y, expected = fused.dropout(x, seed, p), plain.dropout(x, seed, p)
        assert torch.equal(y == 0, expected == 0)
        torch.testing.assert_close(y, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)
        onto = torch.ones_like(x)
        fused.dropout_onto(onto, x, seed, p)
        torch.testing.assert_close(onto, 1 + expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_dropout_drops_a_share_p_whatever_the_seed_and_independently():
    x = torch.ones(1 << 20)
    masks = [fused.dropout(x, seed, 0.25) == 0 for seed in (1, 2, 3)]
    for mask in masks:  # the standard deviation of a share is 0.0004
        assert abs(float(mask.float().mean()) - 0.25) < 0.0025
        assert abs(float((mask[1:] & mask[:-1]).float().mean()) - 0.0625) < 0.0025
    assert abs(float((masks[0] & masks[1]).float().mean()) - 0.0625) < 0.0025
    assert float(fused.dropout(x, 9, 0.25).mean()) == pytest.approx(1, abs=0.005)


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    width=WIDTHS,
    words=st.sampled_from([2, 31, 32, 33, 1000]),
    seed=st.integers(0, 2**31),
)
def test_the_loss_is_cross_entropy_and_its_gradient_softmax_with_l2wrap(dtype, width, words, seed):
    take(width)
    logits, targets = normal((5, words), dtype, seed) * 4, torch.randint(words, (5,), generator=torch.Generator().manual_seed(seed))
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    expected.backward()
    top = logits.double().max(1, keepdim=True)
    gradient = exact.grad.scatter_add(1, (logits == top.values).int().argmax(1, keepdim=True), top.values * 1e-4)  # the first of several
    kept = logits.clone()
    close(fused.softmax_gradient(kept, targets, 1e-4, False).view(1), expected.detach().view(1))
    assert torch.equal(kept, logits)
    fused.softmax_gradient(kept, targets, 1e-4, True)
    close(kept, gradient)


def test_a_target_outside_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match="target 7 is not below the vocabulary of 7"):
        fused.softmax_gradient(torch.zeros(2, 7), torch.tensor([3, 7]), 1e-4, True)


def test_gradients_are_the_same_bits_with_any_number_of_threads():
    def gradients():
        x, w, b = (
            normal((3, 41, 96), torch.float32, 0).requires_grad_(),
            torch.ones(96, requires_grad=True),
            torch.zeros(96, requires_grad=True),
        )
        m = torch.full((1, 1, 96), 0.3, requires_grad=True)
        y, past = fused.norm(x, w, b, 1e-5)
        ((y_mixed, _),) = fused.mix(y, torch.zeros(3, 96), None, [m])
        (y_mixed.square().sum() + past.sum()).backward()
        return [x.grad, w.grad, b.grad, m.grad]

    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(gradients())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_the_unit_the_same_model_comes_out(make_model, monkeypatch):
    tokens = torch.randint(50, (2, 23), generator=torch.Generator().manual_seed(1))
    found = []
    for unit in (fused._unit, lambda *tensors: eager, lambda *tensors: None):
        monkeypatch.setattr(fused, "_unit", unit)
        model = make_model()
        logits, _ = model(tokens)
        (logits * normal(logits.shape, torch.float32, 3)).sum().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters())])
    for ours, torchs, plainly in zip(*found, strict=True):
        assert float((torchs - plainly).abs().max()) <= 1e-5 * float(plainly.abs().max().clamp_min(1))
        assert float((ours - plainly).abs().max()) <= 1e-5 * float(plainly.abs().max().clamp_min(1))  # fp32, sums in another order
