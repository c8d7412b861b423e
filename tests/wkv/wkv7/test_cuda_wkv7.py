"""The WKV7 CUDA kernels, executed on a CPU (fake_gpu.py)."""

import functools

import pytest
import test_heads
import torch
from head_cases import STATES_AND_RESETS, WKV7, assert_close, inputs7, starts, states, states_and_resets


def check(gpu, tensors, state=None, reset=None, initial=None):
    fast = gpu.call("wkv7_case", "outputs_and_gradients", tensors, state, reset, initial)
    assert_close(fast, WKV7.in_fp64(tensors, state, reset, initial))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 35])
def test_lengths(gpu, length):
    check(gpu, inputs7(1, length, 1, 64, seed=length), states(1, 1, 64))


@pytest.mark.parametrize("size", [16, 48, 80, 128, 144, 256])
def test_head_sizes(gpu, size):
    check(gpu, inputs7(1, 19, 1, size), states(1, 1, size), starts(1, 19))


@pytest.mark.parametrize("given", STATES_AND_RESETS)
def test_states_and_resets(gpu, given):
    check(gpu, inputs7(2, 20, 2, 64), *states_and_resets(given, 2, 20, 2, 64))


@pytest.mark.parametrize("length", [1, 17])
def test_reset_at_the_ends_and_everywhere(gpu, length):
    test_heads.check_resets_at_the_ends_and_everywhere(functools.partial(check, gpu), WKV7, length)


@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_decays(gpu, scale):
    check(gpu, inputs7(1, 40, 1, 64, scale=scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128])
def test_half_is_rounded_fp32(gpu, dtype, size):
    gpu.call("wkv7_case", "assert_half_is_rounded_fp32", dtype, inputs7(1, 19, 2, size), states(1, 2, size))


def test_no_gradient_across_documents(gpu):
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, 7] = True
    gy = torch.ones(1, 20, 1, 64)
    gy[:, 7:] = float("nan")
    initial = torch.zeros(1, 1, 64, 64)
    *gradients, gstate, _ = gpu.call("wkv7_gradients", inputs7(1, 20, 1, 64), states(1, 1, 64), initial, reset, gy)
    assert all(g[:, :7].isfinite().all() for g in gradients)
    assert gstate.isfinite().all()
    assert gradients[2][:, 7:].isnan().any()


def test_unaligned_inputs(gpu):
    """The kernels read four elements at once; a tensor may start anywhere in its storage."""
    tensors = inputs7(1, 9, 1, 64)
    gpu.call("wkv7_unaligned", tensors)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (64, ["wkv7_output_fp32 6 1 1 256", "wkv7_gradient_fp32 6 1 1 256"]),
        (32, ["wkv7_output_fp32 6 1 1 256", "wkv7_gradient_fp32 6 1 1 256"]),
        (80, ["wkv7_output_128 12 1 1 256", "wkv7_gradient_128 18 1 1 128"]),
    ],
)
def test_launches(gpu, size, expected):
    """One block for 64 rows of a head; 32 in wide gradients."""
    gpu.call("calls")
    gpu.call("wkv7_case", "outputs_and_gradients", inputs7(2, 1, 3, size))
    calls = [call for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
    assert [call.split(maxsplit=1)[1].startswith(start) for call, start in zip(calls, expected, strict=True)] == [
        True
    ] * 2
