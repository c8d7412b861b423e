"""The WKV6 CUDA kernels with several segments of a sequence in parallel, executed on a CPU
(fake_gpu.py).
"""

import pytest
import torch
from head_cases import (
    STATES_AND_RESETS,
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

from rwkv.wkv import dispatch, wkv6
from rwkv.wkv.autograd import Kernels
from rwkv.wkv.wkv6 import native

SEGMENT = 64


def inputs(batch, length, heads, size, *, constant=False, seed=0):
    """As inputs6, but a state lasts for several segments."""
    r, w, *others = inputs6(batch, length, heads, size, constant=constant, seed=seed)
    return [r, w * 0.01, *others]


@pytest.fixture
def cuda(gpu):
    """The operator with autograd here and the kernels there."""

    def run(*tensors, state=None, reset=None, initial=None, segment=SEGMENT):
        kernels = Kernels(
            *(lambda *x, name=name: gpu.call(name, *x, segment=segment) for name in ("wkv6_forward", "wkv6_backward"))
        )
        return native.run(kernels, *tensors, state, reset, state if initial is None else initial)

    return run


@pytest.fixture
def check(cuda):
    def compare(tensors, state=None, reset=None, initial=None, segment=SEGMENT, **tolerance):
        fast = outputs_and_gradients(
            lambda *x, **named: cuda(*x, **named, segment=segment), tensors, state, reset, initial
        )
        assert_close(fast, WKV6.in_fp64(tensors, state, reset, initial), **tolerance)
        return fast

    return compare


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("length", "segment"), [(1, 64), (63, 64), (65, 64), (128, 64), (200, 64), (200, 128)])
def test_lengths(check, length, segment, constant):
    check(inputs(1, length, 1, 32, constant=constant, seed=length), states(1, 1, 32), segment=segment)


def test_more_segments_than_the_scan_loads_at_once(check):
    """The first state still counts after 19 segments."""
    r, w, *others = inputs(1, 1160, 1, 16)
    check([r, w * 0.1, *others], states(1, 1, 16))


@pytest.mark.parametrize("given", STATES_AND_RESETS)
@pytest.mark.parametrize("constant", [False, True])
def test_states_and_resets(check, given, constant):
    arguments = states_and_resets(given, 2, 140, 2, 16)
    if "reset" in given:  # few enough that some segments have none
        arguments = arguments[0], starts(2, 140, 0.01), arguments[2]
        assert arguments[1].any()
    check(inputs(2, 140, 2, 16, constant=constant), *arguments)


@pytest.mark.parametrize("places", [(0,), (64,), (63,), (127, 128), (20, 100), (149,), (10, 64, 90, 128), range(150)])
def test_places_of_resets(check, places):
    reset = torch.zeros(1, 150, dtype=torch.bool)
    reset[:, list(places)] = True
    check(inputs(1, 150, 1, 16), states(1, 1, 16), reset, states(1, 1, 16, 4))


@pytest.mark.parametrize("size", [48, 64, 80, 144, 256])
def test_head_sizes(check, size):
    length = 70 if size <= 144 else 66
    reset = torch.zeros(1, length, dtype=torch.bool)
    reset[0, 65] = True
    check(inputs(1, length, 1, size, constant=size == 80), states(1, 1, size), reset)


@pytest.mark.parametrize("constant", [False, True])
def test_decays_at_both_ends(check, constant):
    tensors = inputs(1, 200, 1, 64, constant=constant)
    tensors[1] = decays_at_both_ends(tensors[1])
    gw = check(tensors, states(1, 1, 64))["gw"]
    assert (gw[tensors[1] < -200] == 0).all()  # exactly, as the model multiplies it by up to 8100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "constant"), [(64, False), (64, True), (80, False)])
def test_half_is_rounded_fp32(cuda, dtype, size, constant):
    assert_half_is_rounded_fp32(cuda, dtype, inputs(1, 70, 1, size, constant=constant), states(1, 1, size))


def test_no_gradient_across_documents(cuda):
    """A NaN in a later document stays there, which starts in the same segment or a later one."""
    for place in (21, 64, 100):
        reset = torch.zeros(1, 140, dtype=torch.bool)
        reset[0, place] = True
        leaves = [x.requires_grad_() for x in (*inputs(1, 140, 1, 16), states(1, 1, 16))]
        y, _ = cuda(*leaves[:5], state=leaves[5], reset=reset, initial=torch.zeros(1, 1, 16, 16))
        gy = torch.ones_like(y)
        gy[:, place:] = float("nan")
        *gradients, _, gstate = torch.autograd.grad(y, leaves, gy)
        assert all(g[:, :place].isfinite().all() for g in gradients)
        assert gradients[2][:, place:].isnan().all()
        assert gstate.isfinite().all()


def test_nan_reaches_what_depends_on_it(cuda):
    for i in range(4):
        tensors = inputs(1, 140, 1, 16)
        tensors[i][0, 20, 0, 2] = float("nan")
        found, expected = (run(*tensors)[0].isnan() for run in (cuda, WKV6.loop))
        assert torch.equal(found, expected), i


def test_state_is_not_read_after_a_reset(cuda):
    """Nor is a state that is no number passed on, times zero."""
    reset = torch.zeros(1, 140, dtype=torch.bool)
    reset[0, 70] = True
    state = torch.full((1, 1, 16, 16), float("inf"))
    y, last = cuda(*inputs(1, 140, 1, 16), state=state, reset=reset, initial=states(1, 1, 16))
    assert y[:, 70:].isfinite().all()
    assert last.isfinite().all()


def test_gradient_of_single_output(cuda):
    tensors = [*inputs(1, 140, 1, 16), states(1, 1, 16)]
    for pick in (lambda y, last: y.sin().sum(), lambda y, last: last.sin().sum()):
        results = []
        for run in (cuda, WKV6.loop):
            leaves = [x.clone().requires_grad_() for x in tensors]
            results.append(torch.autograd.grad(pick(*run(*leaves[:-1], state=leaves[-1])), leaves, allow_unused=True))
        for ours, theirs in zip(*results, strict=True):
            expected = torch.zeros_like(ours) if theirs is None else theirs
            # fp32 rounding of sums over 140 tokens
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_deterministic(cuda):
    arguments = inputs(2, 140, 1, 64), states(2, 1, 64), starts(2, 140, 0.02)
    first, second = (outputs_and_gradients(cuda, *arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_first_segment_is_that_of_the_other_kernels(cuda):
    tensors, state = inputs(1, 140, 1, 64), states(1, 1, 64)
    chunk, token = (cuda(*tensors, state=state, segment=segment)[0] for segment in (SEGMENT, 0))
    assert torch.equal(chunk[:, :SEGMENT], token[:, :SEGMENT])
    assert not torch.equal(chunk, token)  # the state before the others is rounded otherwise


def test_either_backward_fits_either_forward(gpu):
    tensors, state, reset = inputs(1, 140, 1, 32), states(1, 1, 32), starts(1, 140, 0.02)
    results = []
    for forward, backward in ((64, 64), (0, 64), (64, 0), (0, 0)):
        y, _, saved = gpu.call("wkv6_forward", *tensors, state, state, reset, segment=forward)
        results.append(gpu.call("wkv6_backward", *tensors, state, reset, saved, y, None, segment=backward))
    for others in results[:3]:
        for found, expected in zip(others, results[3], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=4e-6 * float(expected.abs().max()))


def test_unaligned_inputs(gpu):
    """The kernels read four elements at once; a tensor may start anywhere in its storage."""
    tensors = [*inputs(1, 70, 1, 16), states(1, 1, 16), None, None]
    y, last, saved = gpu.call("wkv6_forward", *tensors, segment=SEGMENT)
    arguments = None, None, saved, y, last
    expected = gpu.call("wkv6_backward", *tensors[:5], *arguments, segment=SEGMENT)
    shifted = [None if x is None else torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in tensors]
    assert torch.equal(gpu.call("wkv6_forward", *shifted, segment=SEGMENT)[0], y)
    found = gpu.call("wkv6_backward", *shifted[:5], *arguments, segment=SEGMENT)
    assert all(torch.equal(a, b) for a, b in zip(found[:6], expected[:6], strict=True))


@pytest.mark.parametrize(("size", "kind", "blocks"), [(16, "fp32", 1), (80, "wide", 5)])
def test_launches(gpu, cuda, size, kind, blocks):
    """Per pass a summary of each segment, a scan over segments, and the tokens of each segment."""
    gpu.call("calls")
    outputs_and_gradients(cuda, inputs(2, 130, 1, size))
    calls = [call.split()[1:6] for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
    by_segment, elements = str(2 * 3 * blocks), str(-(-2 * size * size // 4 // 256))
    assert calls == [
        [f"wkv6_{name}", elements if name == "scan" else by_segment, "1", "1", "256"]
        for last in (f"output_{kind}", f"gradient_{kind}")
        for name in (f"summary_{kind}", "scan", last)
    ]


def test_one_segment_is_token_by_token(gpu, cuda):
    gpu.call("calls")
    outputs_and_gradients(cuda, inputs(1, 64, 1, 16))
    calls = [call.split()[1] for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
    assert calls == ["wkv6_output_fp32", "wkv6_gradient_fp32"]


def test_segment_length():
    """Whole intervals of saved states, and no more blocks than bound the workspace."""
    for heads, size, length in ((1, 64, 1), (12, 64, 1024), (12, 64, 100_000), (512, 64, 4096), (1, 256, 4096)):
        segment = native.segment_length(heads, size, length)
        count = -(-length // segment)
        assert segment % native.SAVE_INTERVAL == 0
        assert heads * count * native.blocks_per_head(size) <= max(native.BLOCKS, heads)
    assert native.segment_length(12, 64, 1024) == 64
    assert native.segment_length(600, 64, 4000) == 4032  # one segment
    assert native.segment_length(0, 64, 100) == 64


def test_arguments(cuda):
    with pytest.raises(RuntimeError, match="the tokens per segment must be a multiple of 64, or 0 for all; got 32"):
        cuda(*inputs(1, 3, 1, 16), segment=32)
    y, _ = cuda(*inputs(0, 130, 1, 16))
    assert y.shape == (0, 130, 1, 16)


def test_selected_by_name_only(monkeypatch):
    """For any head size and GPU, unlike RWKV-7's."""
    with pytest.raises(RuntimeError, match="wkv6: impl='cuda-chunk' is unavailable: the inputs are on cpu"):
        wkv6(*inputs(1, 3, 1, 16), impl="cuda-chunk")
    used = []

    def kernels_for(r):
        used.append(r.shape)
        return native.cpu_kernels(r)

    monkeypatch.setattr(dispatch, "_why_not_cuda", lambda x: None)
    monkeypatch.setitem(dispatch._WHY_UNAVAILABLE, "cuda-chunk", lambda x: None)
    monkeypatch.setattr(native, "chunk_kernels_for", kernels_for)
    wkv6(*inputs(1, 3, 1, 16))
    assert not used
    wkv6(*inputs(1, 3, 1, 16), impl="cuda-chunk")
    assert used == [(1, 3, 1, 16)]
