"""The compiled WKV7 operator matches the reference in float64, and explains its absence."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wkv7_cases import assert_close, assert_half_is_rounded_fp32, in_fp64, inputs, outputs_and_gradients, starts, states

from rwkv.kernels import load
from rwkv.wkv import wkv7
from rwkv.wkv.wkv7 import empty_state, reference


def cpu(*tensors, state=None, reset=None, initial=None):
    return wkv7(*tensors, state, reset, initial=initial, impl="cpu")


def loop(*tensors, state=None, reset=None, initial=None):
    return reference.wkv7(*tensors, state, reset, initial)


def check(tensors, state=None, reset=None, initial=None):
    fast = outputs_and_gradients(cpu, tensors, state, reset, initial)
    assert_close(fast, in_fp64(tensors, state, reset, initial))


def test_reference_matches_formula():
    """Each head against the recurrence with matrices, token by token."""
    r, w, k, v, a, b = (x.double() for x in inputs(1, 5, 2, 16))
    S = states(1, 2, 16).double()
    y, last = loop(r, w, k, v, a, b, state=S)
    for h in range(2):
        s = S[0, h]
        for t in range(5):
            at, bt, kt, vt, rt = (x[0, t, h] for x in (a, b, k, v, r))
            s = s @ (torch.diag(w[0, t, h].exp()) + torch.outer(at, bt)) + torch.outer(vt, kt)
            torch.testing.assert_close(y[0, t, h], s @ rt, rtol=1e-12, atol=1e-12)  # fp64 rounding
        torch.testing.assert_close(last[0, h], s, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.sampled_from([1, 3]),
    length=st.sampled_from([1, 2, 15, 16, 17, 33, 50]),
    heads=st.sampled_from([1, 3]),
    size=st.sampled_from([16, 32, 64, 80]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    state=st.booleans(),
    reset=st.booleans(),
    initial=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_kernels_match_reference(batch, length, heads, size, scale, state, reset, initial, seed):
    check(
        inputs(batch, length, heads, size, scale=scale, seed=seed),
        states(batch, heads, size) if state else None,
        starts(batch, length) if reset else None,
        states(batch, heads, size, 4) if initial and reset else None,
    )


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def vectors(request):
    """Run the CPU kernels with vectors of this width, if the CPU has them."""
    if torch.ops.rwkv.cpu_vectors(request.param) != request.param:
        torch.ops.rwkv.cpu_vectors("")
        pytest.skip("this CPU has no such vectors")
    yield request.param
    torch.ops.rwkv.cpu_vectors("")


@pytest.mark.parametrize("size", [16, 48, 64, 256])
def test_vector_widths_match_reference(vectors, size):
    check(inputs(2, 19, 2, size), states(2, 2, size), starts(2, 19))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_rounded_fp32(dtype):
    assert_half_is_rounded_fp32(cpu, dtype, inputs(2, 19, 2, 64), states(2, 2, 64))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_chunks_match_full_sequence(impl):
    tensors, first, reset = inputs(2, 70, 2, 32), states(2, 2, 32), starts(2, 70)
    whole, last = wkv7(*tensors, first, reset, impl=impl)
    for cuts in ([1] * 70, [33, 37], [69, 1]):
        state, chunks = first, []
        for *part, flags in zip(*(x.split(cuts, 1) for x in tensors), reset.split(cuts, 1), strict=True):
            y, state = wkv7(*part, state, flags, initial=first, impl=impl)
            chunks.append(y)
        torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=1e-6, atol=1e-6)  # the same operations
        torch.testing.assert_close(state, last, rtol=1e-6, atol=1e-6)


def test_gradient_through_carried_state():
    tensors = [x.requires_grad_() for x in inputs(2, 40, 2, 32)]
    whole = torch.autograd.grad(cpu(*tensors)[0].sin().sum(), tensors)
    parts, state = [], None
    for cut in (slice(0, 23), slice(23, 40)):
        y, state = cpu(*(x[:, cut] for x in tensors), state=state)
        parts.append(y)
    chunks = torch.autograd.grad(torch.cat(parts, 1).sin().sum(), tensors)
    for ours, theirs in zip(chunks, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # states are recomputed from other tokens


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_reset_returns_to_the_given_state(impl):
    """Packed documents match separate documents, and the initial state's gradient is the sum over
    documents.
    """
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[0, 21] = reset[1, 0] = reset[1, 20] = reset[1, 39] = True
    packed, separate = (
        [x.clone().requires_grad_() for x in (*inputs(2, 40, 2, 32), states(2, 2, 32))] for _ in range(2)
    )
    y, _ = wkv7(*packed, reset, impl=impl)
    expected = []
    for row, cuts in enumerate(((0, 21, 40), (0, 20, 39, 40))):
        parts = [
            wkv7(*(x[row, None, i:j] for x in separate[:6]), separate[6][row, None], impl=impl)[0]
            for i, j in itertools.pairwise(cuts)
        ]
        expected.append(torch.cat(parts, 1))
    torch.testing.assert_close(y, torch.cat(expected), rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(out.sin().sum(), x) for out, x in ((y, packed), (torch.cat(expected), separate)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # different summation order


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_no_gradient_across_documents(impl):
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 21] = True
    leaves = [x.requires_grad_() for x in (*inputs(1, 40, 2, 16), states(1, 2, 16))]
    y, _ = wkv7(*leaves, reset, initial=empty_state(1, 2, 16), impl=impl)
    gy = torch.ones_like(y)
    gy[:, 21:] = float("nan")
    *gradients, gstate = torch.autograd.grad(y, leaves, gy)
    assert all(g[:, :21].isfinite().all() for g in gradients)
    assert gstate.isfinite().all()
    assert gradients[2][:, 21:].isnan().any()


def test_gradient_of_single_output():
    tensors = inputs(2, 20, 2, 32)
    for pick in (lambda y, last: y.sin().sum(), lambda y, last: last.sin().sum()):
        results = []
        for run in (cpu, loop):
            leaves = [x.clone().requires_grad_() for x in (*tensors, states(2, 2, 32))]
            out = pick(*run(*leaves[:6], state=leaves[6]))
            results.append(torch.autograd.grad(out, leaves, allow_unused=True))
        for ours, theirs in zip(*results, strict=True):
            expected = torch.zeros_like(ours) if theirs is None else theirs
            # fp32 rounding of sums over 20 tokens
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_zero_removal_key():
    r, w, k, v, a, b = inputs(1, 20, 1, 64)
    a[:, 5], b[:, 5], b[:, 7] = 0, 0, 0
    check([r, w, k, v, a, b])


def test_nan_propagates():
    for i in range(6):
        tensors = inputs(1, 20, 1, 64)
        tensors[i][0, 3, 0, 2] = float("nan")
        fast, slow = (run(*tensors)[0].isnan() for run in (cpu, loop))
        assert torch.equal(fast, slow), i


def test_long_sequence():
    check(inputs(1, 1025, 1, 16))


def test_independent_of_threads():
    arguments = inputs(3, 40, 3, 32), states(3, 3, 32), starts(3, 40)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(cpu, *arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


def test_strided_inputs():
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(2, 9, 3, 16)]
    assert not tensors[0].is_contiguous()
    torch.testing.assert_close(cpu(*tensors)[0], loop(*tensors)[0], rtol=1e-4, atol=1e-5)  # fp32 rounding


def test_empty_state_is_no_state():
    tensors = inputs(2, 10, 2, 16)
    assert torch.equal(cpu(*tensors)[0], cpu(*tensors, state=empty_state(2, 2, 16))[0])


def test_no_second_derivatives():
    tensors = [x.requires_grad_() for x in inputs(1, 3, 1, 16)]
    with pytest.raises(RuntimeError, match='no second derivatives.*impl="reference"'):
        torch.autograd.grad(cpu(*tensors)[0].sum(), tensors[0], create_graph=True)


def test_invalid_arguments():
    r, w, k, v, a, b = tensors = inputs(2, 5, 2, 16)
    for message, arguments in {
        r"k must be \[2, 5, 2, 16\] .* got \[2, 4, 2, 16\]": (r, w, k[:, :4], v, a, b),
        r"state must be \[2, 2, 16, 16\]": (*tensors, states(1, 2, 16)),
        r"reset must be \[2, 5\]": (*tensors, None, starts(2, 4)),
        "reset must be bool": (*tensors, None, starts(2, 5).int()),
        r"r must be \[B, T, H, N\]": (r[0], w, k, v, a, b),
        "multiple of 16, at most 256; got 8": [x[..., :8] for x in tensors],
        "v must have r's dtype": (r, w, k, v.bfloat16(), a, b),
        "a is on meta and r on cpu": (r, w, k, v, a.to("meta"), b),
        "must be floating-point; got torch.int64": [x.long() for x in tensors],
    }.items():
        with pytest.raises(ValueError, match=message):
            wkv7(*arguments)
    with pytest.raises(ValueError, match="not one of auto, cuda, cpu, reference"):
        wkv7(*tensors, impl="fast")


def test_auto_selects_cpu_kernels(monkeypatch):
    monkeypatch.setattr(reference, "wkv7", lambda *_: pytest.fail("auto fell back to the reference"))
    wkv7(*inputs(1, 3, 1, 16))


def test_auto_fallback_warning(monkeypatch):
    monkeypatch.setattr(load, "why_unavailable", lambda: "it is not compiled for torch 0.0; run: make kernels")
    with pytest.warns(UserWarning, match=r"unavailable(?s:.)*cpu: it is not compiled for torch 0.0; run: make kernels"):
        y, _ = wkv7(*inputs(1, 3, 1, 16))
    assert y.shape == (1, 3, 1, 16)
