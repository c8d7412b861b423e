"""The compiled WKV6 operator matches the reference in float64, and explains its absence."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv.kernels import load
from rwkv.kernels.elementwise import native as elementwise
from rwkv.wkv import wkv6
from rwkv.wkv.wkv6 import empty_state, reference

NAMES = ("gr", "gw", "gk", "gv", "gu", "gstate", "ginitial")


def cpu(*tensors, state=None, reset=None, initial=None):
    return wkv6(*tensors, state, reset, initial=initial, impl="cpu")


def loop(*tensors, state=None, reset=None, initial=None):
    return reference.wkv6(*tensors, state, reset, initial)


def inputs(batch, length, heads, size, *, scale=1.0, constant=False, seed=0):
    """r, w, k, v, u as in the model; `scale` of the logarithm of the log-decay."""
    g = torch.Generator().manual_seed(seed)
    r, k, v = (torch.randn(batch, length, heads, size, generator=g) for _ in range(3))
    raw = torch.randn(*(() if constant else (batch, length)), heads, size, generator=g)
    return [r, -torch.exp(scale * raw), k, v, torch.randn(heads, size, generator=g)]


def states(batch, heads, size, seed=1):
    return torch.randn(batch, heads, size, size, generator=torch.Generator().manual_seed(seed))


def starts(batch, length, share=0.2, seed=2):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


def outputs_and_gradients(run, tensors, state=None, reset=None, initial=None, dtype=None):
    """y, the last state, and all gradients, for random gradients of both outputs."""
    leaves = [
        None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in (*tensors, state, initial)
    ]
    y, last = run(*leaves[:5], state=leaves[5], reset=reset, initial=leaves[6])
    g = torch.Generator().manual_seed(3)
    gy, glast = (torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (y, last))
    ((gy * y).sum() + (glast * last).sum()).backward()
    found = {name: x.grad for name, x in zip(NAMES, leaves, strict=True) if x is not None}
    return {"y": y.detach(), "state": last.detach(), **found}


def assert_close(fast, truth, share=4e-6):
    """Errors relative to the largest element: fp32 rounding over the steps that a state lasts."""
    for name, exact in truth.items():
        error = float((fast[name].double() - exact).abs().max())
        assert error <= share * max(1.0, float(exact.abs().max())), f"{name}: {error}"


def check(tensors, state=None, reset=None, initial=None):
    fast = outputs_and_gradients(cpu, tensors, state, reset, initial)
    assert_close(fast, outputs_and_gradients(loop, tensors, state, reset, initial, torch.float64))


@pytest.mark.parametrize("constant", [False, True])
def test_reference_matches_formula(constant):
    """Each head against the recurrence with matrices, token by token."""
    r, w, k, v, u = (x.double() for x in inputs(1, 5, 2, 16, constant=constant))
    S = states(1, 2, 16).double()
    y, last = loop(r, w, k, v, u, state=S)
    for h in range(2):
        s = S[0, h]
        for t in range(5):
            rt, kt, vt = (x[0, t, h] for x in (r, k, v))
            decay = (w[h] if constant else w[0, t, h]).exp()
            expected = rt @ (s + torch.diag(u[h]) @ torch.outer(kt, vt))
            torch.testing.assert_close(y[0, t, h], expected, rtol=1e-12, atol=1e-12)  # fp64 rounding
            s = torch.diag(decay) @ s + torch.outer(kt, vt)
        torch.testing.assert_close(last[0, h], s, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.sampled_from([1, 3]),
    length=st.sampled_from([1, 2, 63, 64, 65, 100]),
    heads=st.sampled_from([1, 3]),
    size=st.sampled_from([16, 32, 64, 80]),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    constant=st.booleans(),
    state=st.booleans(),
    reset=st.booleans(),
    initial=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_kernels_match_reference(batch, length, heads, size, scale, constant, state, reset, initial, seed):
    check(
        inputs(batch, length, heads, size, scale=scale, constant=constant, seed=seed),
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


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_rounded_fp32(dtype, constant):
    """bf16 and fp16 compute in fp32: the results are those for the same inputs, rounded once."""
    r, w, k, v, u = inputs(2, 19, 2, 64, constant=constant)
    rounded = [r.to(dtype), w, k.to(dtype), v.to(dtype), u.to(dtype)]
    results = []
    for kind in (dtype, torch.float32):
        leaves = [x.detach().to(torch.float32 if x is w else kind).requires_grad_() for x in rounded]
        y, last = cpu(*leaves, state=states(2, 2, 64))
        assert (y.dtype, last.dtype) == (kind, torch.float32)
        gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype).to(kind)
        results.append([y.detach(), last.detach(), *torch.autograd.grad(y, leaves, gy)])
    for name, half, full in zip(("y", "state", *NAMES), *results, strict=False):
        assert torch.equal(half, full.to(half.dtype)), name


@pytest.mark.parametrize("constant", [False, True])
def test_decays_at_both_ends(constant):
    """From e^(−8100), which is 0 in fp32, to 1 − 6e-6: finite, and as the reference in float64."""
    tensors = inputs(1, 70, 2, 64, constant=constant)
    raw = torch.linspace(-12, 9, tensors[1].numel())[torch.randperm(tensors[1].numel())]
    tensors[1] = -torch.exp(raw).view_as(tensors[1])
    found = outputs_and_gradients(cpu, tensors, states(1, 2, 64))
    assert all(x.isfinite().all() for x in found.values())
    check(tensors, states(1, 2, 64))


def test_constant_decay_is_the_same_decay_at_every_token():
    r, w, k, v, u = inputs(2, 70, 2, 32, constant=True)
    reset, first = starts(2, 70), states(2, 2, 32)
    once, every = (outputs_and_gradients(cpu, [r, x, k, v, u], first, reset) for x in (w, w.repeat(2, 70, 1, 1)))
    every["gw"] = every["gw"].sum((0, 1))
    assert_close(once, {name: x.double() for name, x in every.items()})


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_chunks_match_full_sequence(impl):
    tensors, first, reset = inputs(2, 70, 2, 32), states(2, 2, 32), starts(2, 70)
    whole, last = wkv6(*tensors, first, reset, impl=impl)
    u = tensors.pop()
    for cuts in ([1] * 70, [33, 37], [69, 1]):
        state, chunks = first, []
        for *part, flags in zip(*(x.split(cuts, 1) for x in tensors), reset.split(cuts, 1), strict=True):
            y, state = wkv6(*part, u, state, flags, initial=first, impl=impl)
            chunks.append(y)
        torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=1e-6, atol=1e-5)  # fp32 rounding
        torch.testing.assert_close(state, last, rtol=1e-6, atol=1e-6)  # the same operations


def test_gradient_through_carried_state():
    tensors = [x.requires_grad_() for x in inputs(2, 100, 2, 32)]
    whole = torch.autograd.grad(cpu(*tensors)[0].sin().sum(), tensors)
    parts, state = [], None
    for cut in (slice(0, 73), slice(73, 100)):
        y, state = cpu(*(x[:, cut] for x in tensors[:4]), tensors[4], state=state)
        parts.append(y)
    chunks = torch.autograd.grad(torch.cat(parts, 1).sin().sum(), tensors)
    for ours, theirs in zip(chunks, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # sums over 100 tokens in another order


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
    y, _ = wkv6(*packed, reset, impl=impl)
    expected = []
    for row, cuts in enumerate(((0, 21, 40), (0, 20, 39, 40))):
        parts = [
            wkv6(*(x[row, None, i:j] for x in separate[:4]), separate[4], separate[5][row, None], impl=impl)[0]
            for i, j in itertools.pairwise(cuts)
        ]
        expected.append(torch.cat(parts, 1))
    torch.testing.assert_close(y, torch.cat(expected), rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(out.sin().sum(), x) for out, x in ((y, packed), (torch.cat(expected), separate)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # different summation order


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_no_gradient_across_documents(impl):
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 21] = True
    leaves = [x.requires_grad_() for x in (*inputs(1, 40, 2, 16), states(1, 2, 16))]
    y, _ = wkv6(*leaves, reset, initial=empty_state(1, 2, 16), impl=impl)
    gy = torch.ones_like(y)
    gy[:, 21:] = float("nan")
    gradients = torch.autograd.grad(y, leaves, gy)
    assert all(g[:, :21].isfinite().all() for g in gradients[:4])
    assert gradients[5].isfinite().all()
    assert gradients[2][:, 21:].isnan().any()


def test_gradient_of_single_output():
    tensors = inputs(2, 20, 2, 32)
    for pick in (lambda y, last: y.sin().sum(), lambda y, last: last.sin().sum()):
        results = []
        for run in (cpu, loop):
            leaves = [x.clone().requires_grad_() for x in (*tensors, states(2, 2, 32))]
            out = pick(*run(*leaves[:5], state=leaves[5]))
            results.append(torch.autograd.grad(out, leaves, allow_unused=True))
        for ours, theirs in zip(*results, strict=True):
            expected = torch.zeros_like(ours) if theirs is None else theirs
            # fp32 rounding of sums over 20 tokens
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_nan_propagates():
    for i in range(4):
        tensors = inputs(1, 20, 1, 64)
        tensors[i][0, 3, 0, 2] = float("nan")
        fast, slow = (run(*tensors)[0].isnan() for run in (cpu, loop))
        assert torch.equal(fast, slow), i


def test_long_sequence():
    check(inputs(1, 1025, 1, 16))


def test_independent_of_threads():
    arguments = inputs(3, 70, 3, 32), states(3, 3, 32), starts(3, 70)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(cpu, *arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


def test_strided_inputs():
    *tensors, u = inputs(2, 9, 3, 16)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert not tensors[0].is_contiguous()
    torch.testing.assert_close(cpu(*tensors, u)[0], loop(*tensors, u)[0], rtol=1e-4, atol=1e-5)  # fp32 rounding


def test_empty_state_is_no_state():
    tensors = inputs(2, 10, 2, 16)
    assert torch.equal(cpu(*tensors)[0], cpu(*tensors, state=empty_state(2, 2, 16))[0])


@pytest.mark.parametrize("recomputed", [False, True])
def test_recomputed_decay_is_not_saved(recomputed):
    """A decay that carries a Recompute is recomputed in the backward pass."""
    r, w, k, v, u = inputs(1, 70, 2, 16)
    leaf, saved = torch.log(-w).requires_grad_(), []
    decay = elementwise.cheap(negative_exp, leaf) if recomputed else negative_exp(leaf)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        y, _ = cpu(r, decay, k, v, u)
    assert (decay.data_ptr() in saved) != recomputed
    found = torch.autograd.grad(y.sin().sum(), leaf)[0]
    (expected,) = torch.autograd.grad(cpu(r, negative_exp(leaf), k, v, u)[0].sin().sum(), leaf)
    assert torch.equal(found, expected)  # the same operations


def negative_exp(x):
    return -torch.exp(x)


def test_no_second_derivatives():
    tensors = [x.requires_grad_() for x in inputs(1, 3, 1, 16)]
    with pytest.raises(RuntimeError, match='no second derivatives.*impl="reference"'):
        torch.autograd.grad(cpu(*tensors)[0].sum(), tensors[0], create_graph=True)


def test_invalid_arguments():
    r, w, k, v, u = tensors = inputs(2, 5, 2, 16)
    for message, arguments in {
        r"k must be \[2, 5, 2, 16\] .* got \[2, 4, 2, 16\]": (r, w, k[:, :4], v, u),
        r"w must be \[2, 16\] .* got \[5, 2\]": (r, torch.zeros(5, 2), k, v, u),
        r"u must be \[2, 16\] .* got \[1, 16\]": (r, w, k, v, u[:1]),
        r"state must be \[2, 2, 16, 16\]": (*tensors, states(1, 2, 16)),
        r"reset must be \[2, 5\]": (*tensors, None, starts(2, 4)),
        "reset must be bool": (*tensors, None, starts(2, 5).int()),
        r"r must be \[B, T, H, N\]": (r[0], w, k, v, u),
        "multiple of 16, at most 256; got 8": [x[..., :8] for x in tensors],
        "v must have r's dtype": (r, w, k, v.bfloat16(), u),
        "u is on meta and r on cpu": (r, w, k, v, u.to("meta")),
        "must be floating-point; got torch.int64": [x.long() for x in tensors],
    }.items():
        with pytest.raises(ValueError, match=message):
            wkv6(*arguments)
    with pytest.raises(ValueError, match="not one of auto, cpu, reference"):
        wkv6(*tensors, impl="fast")


def test_auto_selects_cpu_kernels(monkeypatch):
    monkeypatch.setattr(reference, "wkv6", lambda *_: pytest.fail("auto fell back to the reference"))
    wkv6(*inputs(1, 3, 1, 16))


def test_auto_fallback_warning(monkeypatch):
    monkeypatch.setattr(load, "why_unavailable", lambda: "it is not compiled for torch 0.0; run: make kernels")
    with pytest.warns(UserWarning, match=r"unavailable(?s:.)*cpu: it is not compiled for torch 0.0; run: make kernels"):
        y, _ = wkv6(*inputs(1, 3, 1, 16))
    assert y.shape == (1, 3, 1, 16)
