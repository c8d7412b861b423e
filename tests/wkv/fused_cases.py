"""Checks of the fused operations against plain torch formulas in fp64, values and gradients. Used
for the CPU kernels, and for the CUDA kernels on a CPU and on a GPU.

Every check takes plain values, so that another process can run it by name (fake_gpu.py).
"""

import contextlib

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from rwkv.kernels.elementwise import native, reference
from rwkv.kernels.elementwise.recompute import recompute_of

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
STREAMS = [(FP32, FP32), (BF16, BF16), (FP32, BF16)]  # dtypes of residual stream and computation
GPU_STREAMS = [*STREAMS, (FP16, FP16), (FP32, FP16)]
SIZES = st.sampled_from([1, 3, 16, 31, 32, 33, 64, 100, 257])
NORM_SIZES = SIZES.filter(lambda c: c > 9)  # the variance of fewer elements may cancel
ROUNDING = {FP32: 2e-6, BF16: 2**-8, FP16: 2**-11}


def normal(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextlib.contextmanager
def computing_in(dtype):
    """As torch.autocast, on any device."""
    before = native.compute_dtype
    native.compute_dtype = lambda x: dtype
    try:
        yield
    finally:
        native.compute_dtype = before


def check(operation, formula, inputs, seed, device):
    """Compare `operation` with `formula` in fp64 on the same inputs: outputs, and gradients of a
    random linear combination of them.
    """
    generator = torch.Generator().manual_seed(seed)
    ours = [x.to(device, copy=True).requires_grad_(x.is_floating_point()) if x is not None else None for x in inputs]
    truth = [x.double().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    outputs, expected = operation(*ours), formula(*truth)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, [w.to(device) for w in weights])
    torch.autograd.backward(expected, [w.double() for w in weights])
    for y, e in zip(outputs, expected, strict=True):
        close(y, e)
    for x, e in zip(ours, truth, strict=True):
        if x is not None and x.is_floating_point():
            close(x.grad, e.grad)


def close(x, truth):
    """Assert that `x` is within its dtype's rounding error of `truth`. bf16, fp16: relative to each
    element, or 1 % of the largest. fp32: relative to the largest element and to the terms of sums
    (near 1), which may cancel.
    """
    rounding, half = ROUNDING[x.dtype], x.dtype != FP32
    assert x.shape == truth.shape
    limit = rounding * torch.maximum(truth.abs(), truth.abs().max().clamp_min(1) * (1e-2 if half else 1))
    error = (x.cpu().double() - truth).abs()
    assert bool((error <= limit).all()), float((error - limit).max().detach())


def recomputes(y):
    """Assert that the recomputation in the backward pass is bit-identical."""
    recompute = recompute_of(y)
    assert torch.equal(recompute.function(*recompute.inputs), y)


def norm(stream, rows, channels, seed, device="cpu"):
    x = normal((2, rows, channels), stream[0], seed) * 3 + 1
    w, b = normal(channels, FP32, seed + 1), normal(channels, FP32, seed + 2)

    def ours(x, w, b):
        with computing_in(stream[1]):
            y = native.norm(x, w, b, 1e-5)
        assert y.dtype == stream[1]
        recomputes(y)
        return (y,)

    check(ours, lambda x, w, b: (F.layer_norm(x, (channels,), w, b, 1e-5),), [x, w, b], seed, device)


def mix(dtype, length, channels, count, reset, seed, device="cpu"):
    x = normal((2, length, channels), dtype, seed)
    last, initial = (normal((2, channels), dtype, seed + i) for i in (1, 3))
    starts = normal((2, length), FP32, seed + 2) > 0.5 if reset else None
    weights = [torch.rand(1, 1, channels, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
    device_starts = starts.to(device) if reset else None

    def ours(x, last, *weights):
        initial, *weights = weights if reset else (None, *weights)
        mixed = native.mix(x, last, device_starts, list(weights), initial)
        for y in mixed:
            recomputes(y)
        return tuple(mixed)

    def formula(x, last, *weights):
        initial, *weights = weights if reset else (None, *weights)
        before = torch.stack([last if t == 0 else x[:, t - 1] for t in range(length)], 1)
        if starts is not None:
            before = torch.where(starts[..., None], initial[:, None], before)
        return tuple(x * m + before * (1 - m) for m in weights)

    check(ours, formula, [x, last, *([initial] if reset else []), *weights], seed, device)


def gates(stream, count, scale, seed, device="cpu"):
    r, v = normal((3, count), stream[1], seed) * scale, normal((3, count), stream[1], seed + 1)
    check(lambda r, v: (native.gate(r, v),), lambda r, v: (torch.sigmoid(r) * v,), [r, v], seed, device)
    check(lambda k: (native.relu2(k),), lambda k: (torch.relu(k).square(),), [v], seed, device)
    recomputes(native.gate(r.to(device), v.to(device)))
    recomputes(native.relu2(v.to(device)))


def dropout(dtype, count, device="cpu"):
    """The mask equals that of `reference.dropout` on every device."""
    x = normal((7, count), dtype, 0) + 5
    for seed, p in ((0, 0.01), (12345, 0.5), (2**31 - 1, 0.9)):
        on_device = torch.tensor(seed, device=device)
        y, expected = native.dropout(x.to(device), on_device, p).cpu(), reference.dropout(x, seed, p)
        assert torch.equal(y == 0, expected == 0)
        tolerance = {"rtol": 2 * ROUNDING[dtype], "atol": 0}
        torch.testing.assert_close(y, expected, **tolerance)
        residual = torch.ones_like(x, device=device)
        native.dropout_add_(residual, x.to(device), on_device, p)
        torch.testing.assert_close(residual.cpu(), 1 + expected, **tolerance)


def loss(dtype, vocab, seed, device="cpu"):
    logits, targets = (
        normal((5, vocab), dtype, seed) * 4,
        torch.randint(vocab, (5,), generator=torch.Generator().manual_seed(seed)),
    )
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    expected.backward()
    top = logits.double().max(1, keepdim=True)
    gradient = exact.grad.scatter_add(
        1, (logits == top.values).int().argmax(1, keepdim=True), top.values * 1e-4
    )  # the first maximum
    for length in (vocab, -(-vocab // 64) * 64):  # of the rows; what is beyond the vocabulary stays as it is
        rows = torch.full((5, length), float("nan"), dtype=dtype, device=device)
        buffer = rows[:, :vocab]
        buffer.copy_(logits)
        close(native.cross_entropy_(buffer, targets.to(device), 1e-4, False).view(1), expected.detach().view(1))
        assert torch.equal(buffer.cpu(), logits)
        native.cross_entropy_(buffer, targets.to(device), 1e-4, True)
        close(buffer, gradient)
        assert rows[:, vocab:].isnan().all()


def not_finite(device="cpu"):
    """NaN and Inf propagate to the outputs that depend on them, and to no other rows or tokens."""
    for bad in (float("nan"), float("inf")):
        x, ones, zeros = normal((2, 5, 64), FP32, 0), torch.ones(64, device=device), torch.zeros(64, device=device)
        x[1, 2, 7] = bad
        x = x.to(device)
        rows = native.norm(x, ones, zeros, 1e-5).isnan().cpu()
        assert rows[1, 2].all()
        assert rows.sum() == 64
        (y,) = native.mix(x, torch.zeros(2, 64, device=device), None, [ones * 0.5])
        assert (~y.isfinite()).nonzero().tolist() == [[1, 2, 7], [1, 3, 7]]
        assert not native.relu2(x).isfinite().all()
        for column in (0, 7):
            logits = normal((3, 64), FP32, 1)
            logits[1, column] = bad
            assert not native.cross_entropy_(
                logits.to(device), torch.tensor([1, 2, 3], device=device), 0.0, True
            ).isfinite()


def all_gradients(device="cpu", shape=(3, 41, 96)):
    """Gradients of a few consecutive operations, to be compared bit for bit."""
    channels = shape[-1]
    x, m = (
        normal(shape, FP32, 0).to(device).requires_grad_(),
        torch.full((1, 1, channels), 0.3, device=device, requires_grad=True),
    )
    w, b = (
        torch.ones(channels, device=device, requires_grad=True),
        torch.zeros(channels, device=device, requires_grad=True),
    )
    y = native.norm(x, w, b, 1e-5)
    (mixed,) = native.mix(y, torch.zeros(shape[0], channels, device=device), None, [m])
    (mixed.square().sum() + x.sum()).backward()
    return [x.grad, w.grad, b.grad, m.grad]
