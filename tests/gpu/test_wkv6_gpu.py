"""The WKV6 CUDA kernels on a GPU: accuracy, determinism, streams, CUDA graphs, memory. Not run on a
GPU so far; tests/wkv/wkv6/test_cuda_wkv6.py runs the kernels on a CPU.
"""

import itertools

import pytest
import torch
from head_cases import WKV6, assert_close, assert_half_is_rounded_fp32, inputs6, outputs_and_gradients, starts, states

from rwkv.wkv import wkv6
from rwkv.wkv.wkv6 import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def on_gpu(*arguments):
    """Tensors, lists of tensors, and None."""
    return [None if x is None else [t.cuda() for t in x] if isinstance(x, list) else x.cuda() for x in arguments]


def cuda(*tensors, state=None, reset=None, initial=None):
    return wkv6(*tensors, state, reset, initial=initial, impl="cuda")


def check(tensors, state=None, reset=None, initial=None):
    arguments = on_gpu(tensors, state, reset, initial)
    assert_close(outputs_and_gradients(cuda, *arguments), WKV6.in_fp64(*arguments))


def test_auto_selects_cuda(monkeypatch):
    monkeypatch.setattr(reference, "wkv6", lambda *_: pytest.fail("auto fell back to the reference"))
    wkv6(*on_gpu(inputs6(1, 3, 1, 64))[0])


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 17, 3, 64), (1, 64, 2, 64), (3, 197, 5, 64)])
@pytest.mark.parametrize(("state", "reset", "initial"), [(False,) * 3, (True, True, False), (True, True, True)])
def test_fp32_close_to_fp64(shape, state, reset, initial, constant):
    batch, length, heads, size = shape
    check(
        inputs6(*shape, constant=constant, seed=length),
        states(batch, heads, size) if state else None,
        starts(batch, length) if reset else None,
        states(batch, heads, size, 4) if initial else None,
    )


@pytest.mark.parametrize("size", [16, 48, 80, 128, 144, 256])
def test_head_sizes(size):
    check(inputs6(2, 70, 2, size), states(2, 2, size), starts(2, 70))


@pytest.mark.parametrize("constant", [False, True])
def test_decays_at_both_ends(constant):
    """From e^(−8100), which is 0 in fp32, to 1 − 6e-6."""
    tensors = inputs6(1, 600, 2, 64, constant=constant)
    raw = torch.linspace(-12, 9, tensors[1].numel())[
        torch.randperm(tensors[1].numel(), generator=torch.Generator().manual_seed(0))
    ]
    tensors[1] = -torch.exp(raw).view_as(tensors[1])
    found = outputs_and_gradients(cuda, *on_gpu(tensors, states(1, 2, 64)))
    assert all(x.isfinite().all() for x in found.values())
    check(tensors, states(1, 2, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "constant"), [(64, False), (64, True), (128, False)])
def test_half_is_rounded_fp32(dtype, size, constant):
    assert_half_is_rounded_fp32(cuda, dtype, *on_gpu(inputs6(3, 100, 5, size, constant=constant), states(3, 5, size)))


@pytest.mark.parametrize("batch", [1, 40])
def test_deterministic(batch):
    arguments = on_gpu(inputs6(batch, 600, 12, 64), states(batch, 12, 64), starts(batch, 600, 0.01))
    first, second = (outputs_and_gradients(cuda, *arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_chunks_match_full_sequence():
    tensors, first, reset = on_gpu(inputs6(2, 70, 2, 64), states(2, 2, 64), starts(2, 70))
    whole, last = cuda(*tensors, state=first, reset=reset)
    state, parts = first, []
    for begin, end in itertools.pairwise((0, 1, 33, 69, 70)):
        part = [*(x[:, begin:end] for x in tensors[:4]), tensors[4]]
        y, state = cuda(*part, state=state, reset=reset[:, begin:end], initial=first)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole)  # the same operations
    assert torch.equal(state, last)


def test_unaligned_inputs():
    """The kernels read four elements at once; a tensor may start anywhere in its storage."""
    tensors = on_gpu(inputs6(1, 33, 2, 64))[0]
    shifted = [torch.empty(x.numel() + 1, device="cuda")[1:].view(x.shape).copy_(x) for x in tensors]
    assert torch.equal(cuda(*shifted)[0], cuda(*tensors)[0])


def test_runs_on_current_stream():
    tensors = on_gpu(inputs6(2, 300, 4, 64))[0]
    expected = cuda(*tensors)[0]
    torch.cuda.synchronize()
    side, late = torch.cuda.Stream(), torch.zeros_like(tensors[2])
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # 0.1 s: work on another stream would run before the copy
        late.copy_(tensors[2])
        y = cuda(*tensors[:2], late, *tensors[3:])[0]
        assert not side.query()  # no synchronisation
    side.synchronize()
    assert torch.equal(y, expected)


def test_cuda_graph_capture():
    tensors = on_gpu(inputs6(2, 300, 4, 64))[0]
    expected = cuda(*tensors)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda(*tensors)[0]
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documented_memory(dtype):
    r, w, k, v, u = on_gpu(inputs6(2, 4096, 16, 64))[0]
    leaves = [x.requires_grad_() for x in (r.to(dtype), w, k.to(dtype), v.to(dtype), u)]
    gy = torch.randn_like(leaves[0])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, last = cuda(*leaves)
    elements = y.numel()
    # cuda/README.md: y, the last state, and N/16 bytes per element for the saved states
    saved = torch.cuda.memory_allocated() - before
    assert saved <= elements * (y.element_size() + 64 / 16) + 4 * last.numel() + (1 << 20)
    torch.autograd.grad(y, leaves, gy)
    peak = torch.cuda.max_memory_allocated() - before
    # plus four gradients, and a workspace of 15 states per head
    assert peak <= elements * (4 * y.element_size() + 4 + 64 / 16) + 18 * 4 * last.numel() + (1 << 20)
