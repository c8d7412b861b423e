"""Implementations of WKV match the reference, or report why they are unavailable."""

import itertools

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
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv import wkv
from rwkv.kernels import load
from rwkv.wkv import empty_state, wkv4
from rwkv.wkv.wkv4 import reference


def cpu(w, u, k, v, state=None, reset=None, initial=None):
    return wkv4(w, u, k, v, state, reset, initial=initial, impl="cpu")


def naive(w, u, k, v):
    """The formula term by term, without state and without shifting exponents."""
    y = torch.zeros_like(k)
    for t in range(k.shape[1]):
        i = torch.arange(t, dtype=w.dtype)
        past = torch.exp((t - 1 - i)[None, :, None] * w + k[:, :t])
        now = torch.exp(u + k[:, t])
        y[:, t] = ((past * v[:, :t]).sum(1) + now * v[:, t]) / (past.sum(1) + now)
    return y


def test_reference_matches_formula():
    w, u, k, v, *_ = inputs(2, 9, 5, state=False, reset=False, dtype=torch.float64)
    torch.testing.assert_close(
        reference.wkv4(w, u, k, v)[0], naive(w, u, k, v), rtol=1e-12, atol=1e-12
    )  # fp64 rounding


def test_reference_gradcheck():
    w, u, k, v, first, starts, _ = inputs(2, 4, 3, dtype=torch.float64)

    def y(w, u, k, v, a, b):
        return reference.wkv4(w, u, k, v, torch.stack([a, b, first[:, 2]], 1), starts)[0]

    assert torch.autograd.gradcheck(
        y, [x.requires_grad_() for x in (w, u, k, v, first[:, 0].clone(), first[:, 1].clone())]
    )


def test_gradient_through_carried_state():
    w, u, k, v, *_ = inputs(2, 12, 3, state=False, reset=False, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (w, u, k, v)]
    whole = torch.autograd.grad(reference.wkv4(*leaves)[0].sin().sum(), leaves)
    y1, state = reference.wkv4(w, u, k[:, :5], v[:, :5])
    y2, _ = reference.wkv4(w, u, k[:, 5:], v[:, 5:], state)
    chunks = torch.autograd.grad(torch.cat([y1, y2], 1).sin().sum(), leaves)
    torch.testing.assert_close(whole, chunks, rtol=1e-10, atol=1e-10)  # fp64 rounding


@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from([1, 2, 5]),
    length=st.sampled_from([1, 2, 31, 32, 33, 64, 97]),
    channels=st.sampled_from([1, 3, 16, 33, 64, 65, 130, 768]),
    scale=st.sampled_from([0.1, 1.0, 10.0, 80.0]),
    state=st.booleans(),
    reset=st.booleans(),
    initial=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_kernels_match_reference(batch, length, channels, scale, state, reset, initial, seed):
    arguments = inputs(
        batch, length, channels, scale=scale, state=state, reset=reset, initial=initial and reset, seed=seed
    )
    fast, slow = outputs_and_gradients(cpu, *arguments), outputs_and_gradients(reference.wkv4, *arguments)
    assert_close(fast, slow, outputs_and_gradients(reference.wkv4, *in_fp64(arguments)), arguments)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("name", ["y", "gw", "gu", "gk", "gv", "gstate"])
def test_accuracy_check_detects_errors(name, scale):
    """`assert_close` rejects 10 % in all elements, and 1 % in the channel with the smallest
    elements. (gw and gu are sums over time; in channels in which they cancel rounding errors are as
    large.)
    """
    arguments = inputs(2, 64, 65, scale=scale)
    slow = outputs_and_gradients(reference.wkv4, *arguments)
    truth = outputs_and_gradients(reference.wkv4, *in_fp64(arguments))
    assert_close(slow, slow, truth, arguments)
    smallest = int(truth[name].abs().reshape(-1, 65).amax(0).argmin())
    for channels, factor in ((slice(None), 1.1), (smallest, 1.01))[: 1 if name in ("gw", "gu") else 2]:
        wrong = slow[name].clone()
        wrong[..., channels] *= factor
        with pytest.raises(AssertionError, match=f"^{name}, "):
            assert_close(slow | {name: wrong}, slow, truth, arguments)


@pytest.mark.parametrize("shape", [(1, 5, 1), (2, 33, 31), (1, 40, 33), (2, 17, 96), (1, 20, 768)])
def test_vector_widths_match_reference(vectors, shape):
    arguments = inputs(*shape)
    fast, slow = outputs_and_gradients(cpu, *arguments), outputs_and_gradients(reference.wkv4, *arguments)
    assert_close(fast, slow, outputs_and_gradients(reference.wkv4, *in_fp64(arguments)), arguments)


@pytest.mark.parametrize("shape", [(1, 5, 1), (2, 33, 31), (1, 40, 33), (2, 17, 96), (1, 20, 768)])
def test_bf16_is_rounded_fp32(vectors, shape):
    assert_half_is_rounded_fp32(cpu, torch.bfloat16, inputs(*shape))


def test_extreme_keys_in_one_channel(vectors):
    # A chunk uses a single scale unless a channel of its block prevents it; the results are the
    # same.
    for scale in (1.0, 4.0):
        near = inputs(2, 50, 16, scale=scale, reset=False)
        far = [x.clone() for x in near[:5]]
        far += [None, far[4]]
        far[2][:, ::7, 3] = 80.0
        far[2][:, 1::7, 3] = -80.0
        others = [c for c in range(16) if c != 3]
        with_far = outputs_and_gradients(cpu, *far)
        for name, ours in outputs_and_gradients(cpu, *near).items():
            size = ours[..., others].abs().amax().item()
            # rounding of the exponents
            torch.testing.assert_close(
                ours[..., others], with_far[name][..., others], rtol=0, atol=3e-5 * size, msg=name
            )


@pytest.mark.parametrize("size", [20.0, 28.0, 29.5, 31.0, 61.0, 100.0])
def test_keys_near_rescaling_threshold(vectors, size):
    for arguments in near_threshold(size):
        fast, slow = outputs_and_gradients(cpu, *arguments), outputs_and_gradients(reference.wkv4, *arguments)
        assert_close(fast, slow, outputs_and_gradients(reference.wkv4, *in_fp64(arguments)), arguments)


@pytest.mark.parametrize("size", [29.0, 45.0, 59.0])
def test_decay_that_underflows(vectors, size):
    arguments = strong_decay(size)
    y, exact = cpu(*arguments)[0], reference.wkv4(*in_fp64(arguments))[0]
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-6)  # rounding; 1 and more if the decay is lost


def test_no_second_derivatives():
    k = torch.randn(1, 3, 4, requires_grad=True)
    y, _ = cpu(-torch.ones(4), torch.ones(4), k, k)
    with pytest.raises(RuntimeError, match='no second derivatives.*impl="reference"'):
        torch.autograd.grad(y.sum(), k, create_graph=True)


def test_long_sequence():
    arguments = inputs(1, 4097, 3, reset=False)
    fast, slow = outputs_and_gradients(cpu, *arguments), outputs_and_gradients(reference.wkv4, *arguments)
    for name in slow:
        # gw sums 4097 terms in fp32, in different order
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_chunks_match_full_sequence(impl):
    w, u, k, v, first, starts, _ = inputs(2, 70, 20)
    whole, last = wkv4(w, u, k, v, first, starts, impl=impl)
    for cuts in ([1] * 70, [33, 37], [69, 1]):
        state, chunks = first, []
        for k1, v1, r1 in zip(k.split(cuts, 1), v.split(cuts, 1), starts.split(cuts, 1), strict=True):
            y, state = wkv4(w, u, k1, v1, state, r1, initial=first, impl=impl)
            chunks.append(y)
        # rounding: a call scales by its own exponents; up to 1.1e-6 with other seeds and vectors
        torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=4e-6, atol=4e-6)
        torch.testing.assert_close(state, last, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_reset_makes_documents_independent(impl):
    w, u, k, v, first, *_ = inputs(1, 20, 8, reset=False)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, 7] = True
    together, _ = wkv4(w, u, k, v, first, starts, initial=empty_state(1, 8), impl=impl)
    alone, _ = wkv4(w, u, k[:, 7:], v[:, 7:], impl=impl)
    torch.testing.assert_close(together[:, 7:], alone, rtol=1e-6, atol=1e-6)  # the same operations


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_reset_restores_initial_state(impl):
    """Packed documents match separate documents, and the initial state's gradient is the sum over
    documents.
    """
    w, u, k, v, first, *_ = inputs(2, 40, 33, reset=False)
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[0, 21] = starts[1, 0] = starts[1, 20] = starts[1, 39] = True
    packed, separate = ([x.clone().requires_grad_() for x in (w, u, k, v, first)] for _ in range(2))
    y, _ = wkv4(*packed, starts, impl=impl)
    expected = []
    for row, cuts in enumerate(((0, 21, 40), (0, 20, 39, 40))):
        a, b, c, d, state = separate
        parts = [
            wkv4(a, b, c[row, None, i:j], d[row, None, i:j], state[row, None], impl=impl)[0]
            for i, j in itertools.pairwise(cuts)
        ]
        expected.append(torch.cat(parts, 1))
    torch.testing.assert_close(y, torch.cat(expected), rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(out.sin().sum(), x) for out, x in ((y, packed), (torch.cat(expected), separate)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # different summation order


def test_wkv4_is_function_and_package():
    from rwkv.wkv.wkv4 import native as module

    assert callable(wkv.wkv4)
    assert module.segment_length(1, 16, 1) == 32


def test_deterministic():
    arguments = inputs(3, 100, 70)
    first, second = (outputs_and_gradients(cpu, *arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


PAYLOADS = [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000]  # bits of NaNs, ∞ and -∞


# w <= 0, and p is a maximum of earlier keys: +∞ in either would have shown before
NOT_FINITE = [(where, bits) for where in "wukvabp" for bits in PAYLOADS if not (where in "wp" and bits == 0x7F800000)]


@pytest.mark.parametrize(("where", "bits"), NOT_FINITE)
def test_nan_and_inf_propagate(vectors, where, bits):
    w, u, k, v, first, *_ = inputs(1, 5, 40, reset=False)
    target = {"w": w, "u": u, "k": k[0, 2], "v": v[0, 2], "a": first[0, 0], "b": first[0, 1], "p": first[0, 2]}[where]
    target.view(torch.int32)[1] = torch.tensor(bits - (1 << 32 if bits >> 31 else 0), dtype=torch.int32)
    hidden = wkv4(w, u, k, v, first, impl="reference")[0].isnan() & ~wkv4(w, u, k, v, first, impl="cpu")[0].isnan()
    assert not hidden.any()


def test_masked_first_token():
    w, u, k, v, *_ = inputs(1, 5, 4, state=False, reset=False)
    k[0, 0, 1] = -float("inf")  # no term has any weight: 0 / 0
    assert torch.equal(wkv4(w, u, k, v, impl="cpu")[0].isnan(), wkv4(w, u, k, v, impl="reference")[0].isnan())


def test_zero_state():
    w, u, k, v, *_ = inputs(2, 20, 40, state=False, reset=False)
    zeros = torch.zeros(2, 3, 40)
    for low in (60.0, 80.0):  # far below the state's maximum, which is 0
        ours, theirs = (wkv4(w, u, k - low, v, zeros, impl=impl)[0] for impl in ("cpu", "reference"))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # rounded exponents of 80: 80 · 2^-24 of e^x


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_no_gradient_across_documents(impl):
    w, u, k, v, first, *_ = inputs(1, 40, 33, reset=False)
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, 21] = True
    leaves = [x.requires_grad_() for x in (k, v, first)]
    y, _ = wkv4(w, u, k, v, first, starts, initial=empty_state(1, 33), impl=impl)
    gy = torch.ones_like(y)
    gy[:, 21:] = float("nan")
    gradients = torch.autograd.grad(y, leaves, gy)
    assert all(g[:, :21].isfinite().all() for g in gradients)
    assert gradients[1][:, 21:].isnan().any()


def test_gradient_of_single_output():
    arguments = inputs(2, 40, 33)
    for pick in (lambda y, last: y.sin().sum(), lambda y, last: last[:, :2].sin().sum()):
        gradients = []
        for impl in ("cpu", "reference"):
            leaves = [x.clone().requires_grad_() for x in arguments[:5]]
            gradients.append(
                torch.autograd.grad(pick(*wkv4(*leaves, arguments[5], impl=impl)), leaves, allow_unused=True)
            )
        for ours, theirs in zip(*gradients, strict=True):
            expected = torch.zeros_like(ours) if theirs is None else theirs
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)  # sums over 40 tokens


def test_empty_state_is_no_state():
    w, u, k, v, *_ = inputs(2, 10, 4, state=False, reset=False)
    assert torch.equal(wkv4(w, u, k, v)[0], wkv4(w, u, k, v, empty_state(2, 4))[0])


def test_shape_mismatch():
    w, u, k, v, first, starts, _ = inputs(2, 5, 4)
    with pytest.raises(ValueError, match=r"w must be \[4\]"):
        wkv4(w[:3], u, k, v)
    with pytest.raises(ValueError, match=r"state must be \[2, 3, 4\]"):
        wkv4(w, u, k, v, first[:1])
    with pytest.raises(ValueError, match=r"reset must be \[2, 5\]"):
        wkv4(w, u, k, v, None, starts[:, :4])
    with pytest.raises(ValueError, match="same shape"):
        wkv4(w, u, k, v[:, :4])
    with pytest.raises(ValueError, match="not one of auto, cuda, cpu, reference"):
        wkv4(w, u, k, v, impl="fast")


def test_device_and_reset_dtype_mismatch():
    w, u, k, v, first, starts, _ = inputs(2, 5, 4)
    with pytest.raises(ValueError, match="u is on meta and k on cpu"):
        wkv4(w, u.to("meta"), k, v)
    with pytest.raises(ValueError, match="reset must be bool"):
        wkv4(w, u, k, v, first, starts.int())


def test_unsupported_dtypes():
    w, u, k, v, *_ = inputs(1, 5, 4, state=False, reset=False)
    with pytest.raises(ValueError, match="must be floating-point; got torch.int64"):
        wkv4(w, u, k.long(), v.long())
    with pytest.raises(ValueError, match="same dtype; got torch.bfloat16 and torch.float32"):
        wkv4(w, u, k.bfloat16(), v)


def test_bool_with_any_nonzero_byte():
    w, u, k, v, *_ = inputs(1, 20, 8, state=False, reset=False)
    starts = torch.zeros(1, 20, dtype=torch.uint8)
    starts[0, 7] = 2
    odd = starts.view(torch.bool)
    assert torch.equal(wkv4(w, u, k, v, None, odd, impl="cpu")[0], wkv4(w, u, k, v, None, starts > 0, impl="cpu")[0])


def test_unavailable_impl():
    with pytest.raises(RuntimeError, match='impl="cuda" is unavailable: the inputs are on cpu'.replace('"', "'")):
        wkv4(*inputs(1, 3, 2)[:4], impl="cuda")
    with pytest.raises(RuntimeError, match="is unavailable: the inputs are on meta"):
        wkv4(*(x.to("meta") for x in inputs(1, 3, 2)[:4]), impl="cpu")


def test_auto_selects_cpu_kernels(monkeypatch):
    monkeypatch.setattr(reference, "wkv4", lambda *_: pytest.fail("auto fell back to the reference"))
    wkv4(*inputs(1, 3, 2)[:4])


def test_auto_fallback_warning(monkeypatch):
    monkeypatch.setattr(load, "why_unavailable", lambda: "it is not compiled for torch 0.0; run: make kernels")
    with pytest.warns(UserWarning, match=r"unavailable(?s:.)*cpu: it is not compiled for torch 0.0; run: make kernels"):
        y, _ = wkv4(*inputs(1, 3, 2)[:4])
    assert y.shape == (1, 3, 2)
    with pytest.raises(RuntimeError, match="make kernels"):
        wkv4(*inputs(1, 3, 2)[:4], impl="cpu")


def test_fp64_uses_reference():
    arguments = inputs(1, 3, 2, dtype=torch.float64)[:4]
    with pytest.warns(UserWarning, match="fp64"):
        y, _ = wkv.wkv4(*arguments)
    assert y.dtype == torch.float64
