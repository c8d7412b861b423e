"""The WKV6 CUDA kernels, executed on a CPU (fake_gpu.py): the tests of the compiled operators, and
what only these kernels have.
"""

import inspect

import pytest
import test_heads
import torch
from head_cases import (
    STATES_AND_RESETS,
    WKV6,
    assert_half_is_rounded_fp32,
    decays_at_both_ends,
    inputs6,
    outputs_and_gradients,
    starts,
    states,
    states_and_resets,
)

from rwkv.wkv.autograd import Kernels
from rwkv.wkv.wkv6 import native


@pytest.fixture
def cuda(gpu):
    """The operator with autograd here and the kernels there."""
    kernels = Kernels(*(lambda *x, name=name: gpu.call(f"wkv6_{name}", *x) for name in ("forward", "backward")))

    def run(*tensors, state=None, reset=None, initial=None):
        return native.run(kernels, *tensors, state, reset, state if initial is None else initial)

    return run


@pytest.fixture
def op(cuda):
    """WKV6 with the CUDA kernels in place of the CPU's."""

    class OnGPU(type(WKV6)):
        def cpu(self, *tensors, **named):
            return cuda(*tensors, **named)

    return OnGPU(**vars(WKV6))


@pytest.mark.parametrize(
    "test",
    [
        test_heads.test_chunks_match_full_sequence,
        test_heads.test_gradient_through_carried_state,
        test_heads.test_reset_returns_to_the_given_state,
        test_heads.test_no_gradient_across_documents,
        test_heads.test_gradient_of_single_output,
        test_heads.test_nan_propagates,
        test_heads.test_strided_inputs,
        test_heads.test_empty_state_is_no_state,
        test_heads.test_no_second_derivatives,
    ],
    ids=lambda test: test.__name__,
)
def test_as_on_cpus(op, test):
    def run(*tensors, **named):  # r, w, k, v, u, and also by position: state, reset
        return op.cpu(*tensors[:5], **dict(zip(("state", "reset"), tensors[5:], strict=False)), **named)

    given = {"op": op, "run": run}
    test(*(given[name] for name in inspect.signature(test).parameters))


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("length", [1, 16, 17, 65, 150])
def test_lengths(op, length, constant):
    size = 64 if length < 100 else 16
    op.check(inputs6(1, length, 1, size, constant=constant, seed=length), states(1, 1, size))


@pytest.mark.parametrize(("size", "length"), [(16, 19), (48, 19), (80, 9), (144, 3), (256, 2)])
def test_head_sizes(op, size, length):
    op.check(inputs6(1, length, 1, size, constant=size == 80), states(1, 1, size), starts(1, length))


@pytest.mark.parametrize("given", STATES_AND_RESETS)
@pytest.mark.parametrize("constant", [False, True])
def test_states_and_resets(op, given, constant):
    op.check(inputs6(2, 20, 2, 32, constant=constant), *states_and_resets(given, 2, 20, 2, 32))


@pytest.mark.parametrize("length", [1, 17])
def test_reset_at_the_ends_and_everywhere(op, length):
    test_heads.check_resets_at_the_ends_and_everywhere(op.check, op, length)


@pytest.mark.parametrize("constant", [False, True])
def test_decays_at_both_ends(op, constant):
    tensors = inputs6(1, 70, 1, 64, constant=constant)
    tensors[1] = decays_at_both_ends(tensors[1])
    op.check(tensors, states(1, 1, 64))
    gw = outputs_and_gradients(op.cpu, tensors, states(1, 1, 64))["gw"]
    assert (gw[tensors[1] < -200] == 0).all()  # exactly, as the model multiplies it by up to 8100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "constant"), [(64, False), (64, True), (80, False)])
def test_half_is_rounded_fp32(cuda, dtype, size, constant):
    assert_half_is_rounded_fp32(cuda, dtype, inputs6(1, 5, 1, size, constant=constant), states(1, 1, size))


def test_deterministic(cuda):
    arguments = inputs6(2, 20, 1, 64), states(2, 1, 64), starts(2, 20)
    first, second = (outputs_and_gradients(cuda, *arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unaligned_inputs(gpu):
    """The kernels read four elements at once; a tensor may start anywhere in its storage."""
    tensors = [*inputs6(1, 9, 1, 64), states(1, 1, 64), None, None]
    y, _, saved = gpu.call("wkv6_forward", *tensors)
    expected = gpu.call("wkv6_backward", *tensors[:5], None, None, saved, y, None)
    shifted = [None if x is None else torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in tensors]
    assert shifted[0].storage_offset() == 1  # which pickling keeps
    assert torch.equal(gpu.call("wkv6_forward", *shifted)[0], y)
    found = gpu.call("wkv6_backward", *shifted[:5], None, None, saved, y, None)
    assert all(torch.equal(a, b) for a, b in zip(found[:6], expected[:6], strict=True))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (64, ["wkv6_output_fp32 6 1 1 256", "wkv6_gradient_fp32 6 1 1 256"]),
        (32, ["wkv6_output_fp32 6 1 1 256", "wkv6_gradient_fp32 6 1 1 256"]),
        (80, ["wkv6_output_wide 30 1 1 256", "wkv6_gradient_wide 30 1 1 256"]),
    ],
)
def test_launches(gpu, cuda, size, expected):
    """One launch per pass. A block has up to 64 keys of a head; 16 of larger heads."""
    gpu.call("calls")
    outputs_and_gradients(cuda, inputs6(2, 1, 3, size))
    calls = [call.split(maxsplit=1)[1] for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
    assert len(calls) == 2
    assert all(call.startswith(start) for call, start in zip(calls, expected, strict=True))


def test_empty_batch_launches_nothing(gpu, cuda):
    gpu.call("calls")
    y, last = cuda(*inputs6(0, 3, 1, 64))
    assert (y.shape, last.shape) == ((0, 3, 1, 64), (0, 1, 64, 64))
    assert not gpu.call("calls")
