"""The WKV7 CUDA kernels by chunks, executed on a CPU (fake_gpu.py), where tensor cores take
operands from the lanes of a warp and round towards zero.
"""

import pytest
import torch
from head_cases import STATES_AND_RESETS, WKV7, assert_close, inputs7, starts, states, states_and_resets

from rwkv.kernels import load
from rwkv.wkv import dispatch, wkv7
from rwkv.wkv.wkv7 import native, time_mix


def run(gpu, tensors, state=None, reset=None, initial=None, chunks=8):
    """y, the state and gradients, with so many chunks of a sequence per launch."""
    return gpu.call("wkv7_case", "outputs_and_gradients", tensors, state, reset, initial, chunks=chunks)


def check(gpu, tensors, state=None, reset=None, initial=None, chunks=8):
    fast = run(gpu, tensors, state, reset, initial, chunks)
    assert_close(fast, WKV7.in_fp64(tensors, state, reset, initial))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
def test_lengths(gpu, length):
    check(gpu, inputs7(1, length, 1, 64, seed=length), states(1, 1, 64), chunks=2)


@pytest.mark.parametrize("given", STATES_AND_RESETS)
def test_states_and_resets(gpu, given):
    check(gpu, inputs7(2, 20, 2, 64), *states_and_resets(given, 2, 20, 2, 64))


@pytest.mark.parametrize("places", [(0,), (16,), (15, 16, 17), (31,), (20, 21, 30), range(48)])
def test_places_of_resets(gpu, places):
    reset = torch.zeros(1, 48, dtype=torch.bool)
    reset[:, list(places)] = True
    check(gpu, inputs7(1, 48, 1, 64), states(1, 1, 64), reset, states(1, 1, 64, 4), chunks=2)


@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_decays(gpu, scale):
    check(gpu, inputs7(1, 40, 1, 64, scale=scale))


def test_long_memory(gpu):
    """A state that lasts for many chunks does not gather the rounding of the tensor cores."""
    tensors = inputs7(1, 480, 1, 64)
    tensors[1] *= 1e-3
    check(gpu, tensors, states(1, 1, 64))


def test_strongest_decay(gpu):
    tensors = inputs7(1, 40, 1, 64)
    tensors[1][:] = -1
    check(gpu, tensors, states(1, 1, 64))
    tensors[1][:] = -4
    fast = run(gpu, tensors, states(1, 1, 64))
    # gw is e^w of the terms, like r · gr, whose differences it is computed from
    assert_close(fast, WKV7.in_fp64(tensors, states(1, 1, 64)), share=4e-5)
    tensors[1][0, 20, 0, 5] = -4.5  # not computed, but not silently
    found = run(gpu, tensors, states(1, 1, 64))
    assert found["y"][:, :16].isfinite().all()
    assert found["y"][:, 20:].isnan().all()
    assert found["state"][..., 5].isnan().all()


def test_nan_reaches_what_depends_on_it(gpu):
    for i in range(6):
        tensors = inputs7(1, 40, 1, 64)
        tensors[i][0, 20, 0, 2] = float("nan")
        found, expected = (x["y"].isnan() for x in (run(gpu, tensors), WKV7.in_fp64(tensors)))
        assert found[expected].all(), i
        assert not found[:, :16].any(), i  # it spreads over its chunk only


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_rounded_fp32(gpu, dtype):
    inputs = inputs7(1, 19, 2, 64), states(1, 2, 64)
    gpu.call("wkv7_case", "assert_half_is_rounded_fp32", dtype, *inputs, chunks=1)


def test_independent_of_launches(gpu):
    arguments = inputs7(1, 70, 2, 64), states(1, 2, 64), starts(1, 70), states(1, 2, 64, 4)
    results = [run(gpu, *arguments, chunks=chunks) for chunks in (1, 2, 100)]
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


def test_no_gradient_across_documents(gpu):
    """Documents of one chunk: what a later one gets does not change the earlier one's gradients."""
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, 7] = True
    tensors, state, initial = inputs7(1, 20, 1, 64), states(1, 1, 64), torch.zeros(1, 1, 64, 64)
    results = []
    for later in (1.0, 1e30):
        gy = torch.ones(1, 20, 1, 64)
        gy[:, 7:] = later
        results.append(gpu.call("wkv7_gradients", tensors, state, initial, reset, gy, chunks=8))
    for small, large in zip(*(found[:6] for found in results), strict=True):
        assert torch.equal(small[:, :7], large[:, :7])
    assert torch.equal(results[0][6], results[1][6])
    assert not torch.equal(results[0][7], results[1][7])


def test_saved_states_are_those_of_the_other_kernels(gpu):
    """Either backward pass fits either forward pass."""
    tensors, state, reset = inputs7(1, 40, 1, 64), states(1, 1, 64), starts(1, 40, 0.05)
    ours, theirs = (gpu.call("wkv7_saved", tensors, state, reset, chunks=chunks) for chunks in (8, 0))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-6 * float(theirs.abs().max()))  # fp32 rounding


def test_unaligned_inputs(gpu):
    gpu.call("wkv7_unaligned", inputs7(1, 9, 1, 64), chunks=8)


def test_launches(gpu):
    """One block per head for scans, and per chunk otherwise; backward from the last chunks on."""
    gpu.call("calls")
    run(gpu, inputs7(1, 40, 3, 64), chunks=2)
    calls = [call.split()[1:3] for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
    forward, backward = ("prepare", "scan", "output"), ("prepare", "scan_gradient", "gradient")
    assert calls == [
        [f"wkv7_chunk_{name}", "3" if "scan" in name else str(3 * chunks)]
        for names, order in ((forward, (2, 1)), (backward, (1, 2)))
        for chunks in order
        for name in names
    ]


def test_workspace_is_bounded():
    for heads in (1, 12, 512, 2048):
        assert native.slice_length(heads) * heads <= 8192
    assert native.slice_length(100_000) == 4


def test_arguments(gpu):
    with pytest.raises(RuntimeError, match="heads of 64 elements; r has 32"):
        run(gpu, inputs7(1, 3, 1, 32))
    with pytest.raises(RuntimeError, match="chunks per launch must be at least 1; got -1"):
        run(gpu, inputs7(1, 3, 1, 64), chunks=-1)


def test_why_unavailable(monkeypatch):
    with pytest.raises(RuntimeError, match="impl='cuda-chunk' is unavailable: the inputs are on cpu"):
        wkv7(*inputs7(1, 3, 1, 64), impl="cuda-chunk")
    monkeypatch.setattr(dispatch, "_why_not_cuda", lambda x: None)
    with pytest.raises(RuntimeError, match='the heads have 32 elements; it takes heads of 64; use impl="cuda"'):
        wkv7(*inputs7(1, 3, 1, 32), impl="cuda-chunk")
    monkeypatch.setattr(dispatch.torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match="compute capability 7.5; it needs 8.0"):
        wkv7(*inputs7(1, 3, 1, 64), impl="cuda-chunk")


def test_time_mix_selects_the_kernels(monkeypatch):
    """The kernels by chunks run in forward and backward."""
    used = []

    def kernels_for(r):
        used.append(r.shape)
        return native.cpu_kernels(r)

    assert load.why_unavailable() is None
    monkeypatch.setattr(dispatch, "_why_not_cuda", lambda x: None)
    monkeypatch.setattr(dispatch.torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(native, "chunk_kernels_for", kernels_for)
    x = time_mix.Projections(*(torch.randn(1, 5, 64, requires_grad=True) for _ in range(6)), None)
    w0, a0, k_k, k_a = torch.zeros(4, 1, 1, 64)
    p = time_mix.Parameters(torch.ones(64), torch.zeros(64), torch.zeros(1, 64), w0, a0, None, k_k, k_a)
    y, _ = time_mix.time_mix(x, None, p, torch.zeros(1, 1, 64, 64), eps=1e-5, impl="cuda-chunk")
    y.sum().backward()
    assert used == [(1, 5, 1, 64)] * 2
