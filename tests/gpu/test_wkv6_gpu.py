"""What is particular to the WKV6 CUDA kernels on a GPU (see also test_heads_gpu.py): constant
decays, several segments, memory. Not run on a GPU so far; tests/wkv/wkv6 runs the kernels on a CPU.
"""

import pytest
import torch
from head_cases import (
    WKV6,
    assert_close,
    assert_half_is_rounded_fp32,
    decays_at_both_ends,
    inputs6,
    outputs_and_gradients,
    starts,
    states,
    states_and_resets,
)

from rwkv.wkv import wkv6
from rwkv.wkv.wkv6.native import segment_length
from tests.gpu.on_gpu import on_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def cuda(*tensors, state=None, reset=None, initial=None):
    return wkv6(*tensors, state, reset, initial=initial, impl="cuda")


def chunk(*tensors, state=None, reset=None, initial=None):
    return wkv6(*tensors, state, reset, initial=initial, impl="cuda-chunk")


def check(tensors, state=None, reset=None, initial=None, run=cuda, **tolerance):
    arguments = on_gpu(tensors, state, reset, initial)
    assert_close(outputs_and_gradients(run, *arguments), WKV6.in_fp64(*arguments), **tolerance)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("heads", "size"), [(1, 64), (12, 64), (2, 128)])
def test_states_that_last_for_several_segments(heads, size, constant):
    r, w, *others = inputs6(2, 1000, heads, size, constant=constant)
    tensors, reset = [r, w * 0.01, *others], starts(2, 1000, 0.002)
    assert segment_length(2 * heads, size, 1000) < 1000
    arguments = on_gpu(tensors, states(2, heads, size), reset, states(2, heads, size, 4))
    # with the same rounding of each e^w, which acts up to 1000 times
    assert_close(outputs_and_gradients(chunk, *arguments), outputs_and_gradients(cuda, *arguments))


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 17, 3, 64), (1, 64, 2, 64), (3, 197, 5, 64)])
@pytest.mark.parametrize("given", ["none", "state, reset", "state, reset, initial"])
def test_constant_decay(shape, given):
    """One decay for every token, as in RWKV-5."""
    check(inputs6(*shape, constant=True, seed=shape[1]), *states_and_resets(given, *shape))


@pytest.mark.parametrize("size", [16, 48, 80, 128, 144, 256])
def test_head_sizes(size):
    check(inputs6(2, 70, 2, size), states(2, 2, size), starts(2, 70))


@pytest.mark.parametrize("run", [cuda, chunk])
@pytest.mark.parametrize("constant", [False, True])
def test_decays_at_both_ends(constant, run):
    tensors = inputs6(1, 600, 2, 64, constant=constant)
    tensors[1] = decays_at_both_ends(tensors[1])
    found = outputs_and_gradients(run, *on_gpu(tensors, states(1, 2, 64)))
    assert all(x.isfinite().all() for x in found.values())
    # the rounding of a decay near 1 acts 600 times; the PyTorch loop in fp32 deviates by 1.2e-5
    check(tensors, states(1, 2, 64), run=run, share=3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_with_constant_decay_is_rounded_fp32(dtype):
    assert_half_is_rounded_fp32(cuda, dtype, *on_gpu(inputs6(3, 100, 5, 64, constant=True), states(3, 5, 64)))


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
