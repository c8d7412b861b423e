"""What the CUDA kernels of WKV6 and WKV7 have in common, on a GPU: accuracy, determinism, streams,
CUDA graphs. Those of WKV6 have not been run on a GPU so far.
"""

import itertools

import pytest
import torch
from head_cases import (
    WKV6,
    WKV7,
    assert_close,
    assert_half_is_rounded_fp32,
    outputs_and_gradients,
    starts,
    states,
    states_and_resets,
)

from tests.gpu.on_gpu import has_tensor_cores, on_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


@pytest.fixture(
    params=[
        pytest.param((WKV6, "cuda"), id="wkv6"),
        pytest.param((WKV6, "cuda-chunk"), id="wkv6 by chunks"),
        pytest.param((WKV7, "cuda"), id="wkv7"),
        pytest.param(
            (WKV7, "cuda-chunk"),
            id="wkv7 by chunks",
            marks=pytest.mark.skipif(not has_tensor_cores(), reason="needs tensor cores for TF32"),
        ),
    ]
)
def kind(request):
    """An operator and the name of an implementation."""
    return request.param


@pytest.fixture
def op(kind):
    return kind[0]


@pytest.fixture
def cuda(kind):
    """The operator by this implementation."""
    op, impl = kind

    def run(*tensors, state=None, reset=None, initial=None):
        return op.function(*tensors, state, reset, initial=initial, impl=impl)

    return run


@pytest.mark.parametrize("op", [WKV6, WKV7], ids=lambda op: op.name)
def test_auto_selects_cuda(op, monkeypatch):
    monkeypatch.setattr(op.reference, op.name, lambda *_: pytest.fail("auto fell back to the reference"))
    op.function(*on_gpu(op.inputs(1, 3, 1, 64))[0])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64), (2, 15, 3, 64), (1, 16, 2, 64), (2, 17, 1, 64), (1, 64, 2, 64), (3, 197, 5, 64)]
)
@pytest.mark.parametrize("given", ["none", "state, reset", "state, reset, initial"])
def test_fp32_close_to_fp64(op, cuda, shape, given):
    arguments = on_gpu(op.inputs(*shape, seed=shape[1]), *states_and_resets(given, *shape))
    assert_close(outputs_and_gradients(cuda, *arguments), op.in_fp64(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128])
def test_half_is_rounded_fp32(kind, cuda, dtype, size):
    op, _ = kind
    if kind == (WKV7, "cuda-chunk") and size != 64:
        pytest.skip("heads of 64 only")
    assert_half_is_rounded_fp32(cuda, dtype, *on_gpu(op.inputs(3, 100, 5, size), states(3, 5, size)))


@pytest.mark.parametrize("batch", [1, 40])
def test_deterministic(op, cuda, batch):
    arguments = on_gpu(op.inputs(batch, 600, 12, 64), states(batch, 12, 64), starts(batch, 600, 0.01))
    first, second = (outputs_and_gradients(cuda, *arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_chunks_match_full_sequence(kind, cuda):
    op, impl = kind
    tensors, first, reset = on_gpu(op.inputs(2, 70, 2, 64), states(2, 2, 64), starts(2, 70))
    whole, last = cuda(*tensors, state=first, reset=reset)
    state, parts = first, []
    for begin, end in itertools.pairwise((0, 16, 48, 64, 70) if impl == "cuda-chunk" else (0, 1, 33, 69, 70)):
        part = [*(x[:, begin:end] for x in tensors[: op.by_token]), *tensors[op.by_token :]]
        y, state = cuda(*part, state=state, reset=reset[:, begin:end], initial=first)
        parts.append(y)
    if kind == (WKV6, "cuda-chunk"):  # the scan rounds the state between segments otherwise
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=op.atol)
        torch.testing.assert_close(state, last, rtol=1e-6, atol=op.atol)
    else:
        assert torch.equal(torch.cat(parts, 1), whole)  # the same operations
        assert torch.equal(state, last)


def test_unaligned_inputs(op, cuda):
    """The kernels read four elements at once; a tensor may start anywhere in its storage."""
    tensors = on_gpu(op.inputs(1, 33, 2, 64))[0]
    shifted = [torch.empty(x.numel() + 1, device="cuda")[1:].view(x.shape).copy_(x) for x in tensors]
    assert torch.equal(cuda(*shifted)[0], cuda(*tensors)[0])


def test_runs_on_current_stream(op, cuda):
    tensors = on_gpu(op.inputs(2, 300, 4, 64))[0]
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


def test_cuda_graph_capture(op, cuda):
    tensors = on_gpu(op.inputs(2, 300, 4, 64))[0]
    expected = cuda(*tensors)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda(*tensors)[0]
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
