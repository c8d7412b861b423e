"""The WKV CUDA kernels on a GPU: accuracy, determinism, streams, CUDA graphs, memory."""

import pytest
import torch
from cases import (
    assert_close,
    assert_half_is_rounded_fp32,
    in_fp64,
    inputs,
    near_threshold,
    outputs_and_gradients,
    strong_decay,
)

from rwkv.kernels import load
from rwkv.wkv import wkv4
from rwkv.wkv.wkv4 import native, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def on_gpu(arguments):
    moved = {id(x): x.cuda() for x in arguments if x is not None}
    return [moved.get(id(x)) for x in arguments]  # a tensor passed twice stays one tensor


def cuda(w, u, k, v, state=None, reset=None, initial=None):
    return wkv4(w, u, k, v, state, reset, initial=initial, impl="cuda")


def test_auto_selects_cuda(monkeypatch):
    monkeypatch.setattr(reference, "wkv4", lambda *_: pytest.fail("auto fell back to the reference"))
    wkv4(*on_gpu(inputs(1, 3, 2))[:6])


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 80.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 15, 33), (3, 16, 768), (1, 33, 5), (2, 97, 130), (5, 300, 70), (1, 700, 768)]
)
@pytest.mark.parametrize(("state", "reset", "initial"), [(False,) * 3, (True, True, False), (True, True, True)])
def test_fp32_close_to_fp64(shape, scale, state, reset, initial):
    seed = hash((shape, scale)) % 1000
    arguments = inputs(*shape, scale=scale, state=state, reset=reset, initial=initial, seed=seed)
    fast = outputs_and_gradients(cuda, *on_gpu(arguments))
    slow = outputs_and_gradients(reference.wkv4, *arguments)
    truth = outputs_and_gradients(reference.wkv4, *in_fp64(arguments))
    assert_close({name: x.cpu() for name, x in fast.items()}, slow, truth, arguments)


@pytest.mark.parametrize("size", [20.0, 28.0, 29.5, 31.0, 61.0])
def test_keys_near_rescaling_threshold(size):
    for arguments in near_threshold(size):
        fast = outputs_and_gradients(cuda, *on_gpu(arguments))
        slow = outputs_and_gradients(reference.wkv4, *arguments)
        truth = outputs_and_gradients(reference.wkv4, *in_fp64(arguments))
        assert_close({name: x.cpu() for name, x in fast.items()}, slow, truth, arguments)


@pytest.mark.parametrize("size", [29.0, 45.0])
def test_decay_that_underflows(size):
    arguments = strong_decay(size)
    y, exact = cuda(*on_gpu(arguments))[0].cpu(), reference.wkv4(*in_fp64(arguments))[0]
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-4)  # rounded exponents; 1 if the decay is lost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_fp32(dtype):
    assert_half_is_rounded_fp32(cuda, dtype, on_gpu(inputs(3, 200, 130)))


@pytest.mark.parametrize("segment", [16, 48, 1024])
def test_any_segment_length(segment):
    arguments = inputs(2, 500, 64)
    moved = on_gpu(arguments)
    assert load.why_unavailable_on(0) is None
    kernels = native.cuda_kernels(0, lambda: torch.cuda.current_stream().cuda_stream, segment)
    fast = outputs_and_gradients(lambda *x: native.run(kernels, *x), *moved)
    slow = outputs_and_gradients(reference.wkv4, *arguments)
    truth = outputs_and_gradients(reference.wkv4, *in_fp64(arguments))
    assert_close({name: x.cpu() for name, x in fast.items()}, slow, truth, arguments)


def test_long_sequence():
    arguments = inputs(1, 16384, 8, reset=False, state=False)
    with torch.no_grad():
        fast, _ = cuda(*on_gpu(arguments))
        exact, _ = reference.wkv4(*(x.double().cuda() if x is not None else None for x in arguments))
    torch.testing.assert_close(fast.double(), exact, rtol=1e-4, atol=1e-5)  # 16384 decays rounded to fp32


def test_deterministic():
    arguments = on_gpu(inputs(4, 2048, 768))
    first, second = (outputs_and_gradients(cuda, *arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nan_and_inf_propagate():
    w, u, k, v, *_ = inputs(1, 50, 4, state=False, reset=False)
    for bad in (float("nan"), float("inf")):
        broken = k.clone()
        broken[0, 20, 1] = bad
        y = cuda(*on_gpu((w, u, broken, v)))[0].cpu()
        assert torch.equal(y.isnan(), reference.wkv4(w, u, broken, v)[0].isnan())


def test_runs_on_current_stream():
    w, u, k, v, *_ = on_gpu(inputs(2, 300, 256, state=False, reset=False))
    expected = cuda(w, u, k, v)[0]
    torch.cuda.synchronize()
    side, late = torch.cuda.Stream(), torch.zeros_like(k)
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # 0.1 s: work on another stream would run before the copy
        late.copy_(k)
        y = cuda(w, u, late, v)[0]
        assert not side.query()  # no synchronisation
    side.synchronize()
    assert torch.equal(y, expected)


def test_cuda_graph_capture():
    w, u, k, v, *_ = on_gpu(inputs(2, 300, 256, state=False, reset=False))
    expected = cuda(w, u, k, v)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda(w, u, k, v)[0]
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("length", [4096, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documented_memory(dtype, length):
    shape = (2, length, 1024)
    w, u = (torch.randn(1024, device="cuda") for _ in range(2))
    leaves = [-w.exp(), u, *(torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))]
    leaves = [x.requires_grad_() for x in leaves]
    gy = torch.randn(shape, device="cuda", dtype=dtype)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, _ = cuda(*leaves)
    elements = leaves[2].numel()
    # cuda/README.md: y, and 3/16 fp32 per element for the saved states; the rest is [B, segments,
    # ...]
    saved = torch.cuda.memory_allocated() - before
    assert saved <= elements * (y.element_size() + 4 * 3 / 16) * 1.02 + (1 << 20)
    torch.autograd.grad(y, leaves, gy)
    peak = torch.cuda.max_memory_allocated() - before
    # plus gk and gv, and 5 fp32 per channel and segment of at least 32 tokens
    assert peak <= elements * (3 * y.element_size() + 4 * 3 / 16 + 4 * 5 / 32) * 1.02 + (1 << 20)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 48 << 30,
    reason="needs 48 GiB of GPU memory",
)
def test_64_bit_offsets():
    length, channels, tail = 1_100_000, 2048, 64  # 2.25 · 10^9 elements
    w, u, *_ = on_gpu(inputs(1, 1, channels, state=False, reset=False))
    k, v = (torch.randn(1, length, channels, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    y, last = cuda(w, u, k, v)
    _, before = cuda(w, u, k[:, :-tail].detach(), v[:, :-tail].detach())
    k1, v1 = (x[:, -tail:].detach().clone().requires_grad_() for x in (k, v))
    y1, last1 = cuda(w, u, k1, v1, before)
    torch.testing.assert_close(y[:, -tail:], y1, rtol=2**-7, atol=2**-7)  # other segments, rounded to 8 bits
    torch.testing.assert_close(last, last1, rtol=1e-4, atol=1e-4)
    gy = torch.zeros_like(y)
    gy[:, -tail:] = torch.randn(1, tail, channels, device="cuda", dtype=torch.bfloat16)
    ours = torch.autograd.grad(y, (k, v), gy)
    theirs = torch.autograd.grad(y1, (k1, v1), gy[:, -tail:].contiguous())
    for whole, part in zip(ours, theirs, strict=True):
        torch.testing.assert_close(whole[:, -tail:], part, rtol=2**-6, atol=2**-6)
