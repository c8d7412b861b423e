"""The operator's contract: every implementation gives the reference's numbers, and says why when it cannot run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv import wkv
from rwkv.wkv import build, empty_state, native, reference, wkv4


def inputs(batch, length, channels, *, scale=1.0, state=True, reset=True, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    w, u = -torch.exp(normal(channels) * 2), normal(channels) * scale
    k, v = normal(batch, length, channels) * scale, normal(batch, length, channels)
    first = (
        torch.stack([normal(batch, channels), normal(batch, channels).abs() + 0.1, normal(batch, channels) * scale], 1) if state else None
    )
    starts = torch.rand(batch, length, generator=g) < 0.2 if reset else None
    return w, u, k, v, first, starts


def outputs_and_gradients(impl, w, u, k, v, first, starts):
    leaves = [x.clone().requires_grad_() for x in (w, u, k, v)] + ([first.clone().requires_grad_()] if first is not None else [])
    y, last = wkv4(*leaves[:4], leaves[4] if first is not None else None, starts, impl=impl)
    # Both outputs matter, each element differently; sin keeps the weights bounded.
    (torch.sin(3 * y.float()).sum() + torch.sin(last[:, 0]).sum() + torch.cos(last[:, 1]).sum()).backward()
    return {
        "y": y.detach(),
        "state": last.detach(),
        **dict(zip(("gw", "gu", "gk", "gv", "gstate"), (x.grad for x in leaves), strict=False)),
    }


def naive(w, u, k, v):
    """The formula, term by term, in fp64: no state, no shift."""
    y = torch.zeros_like(k)
    for t in range(k.shape[1]):
        i = torch.arange(t, dtype=w.dtype)
        past = torch.exp((t - 1 - i)[None, :, None] * w + k[:, :t])
        now = torch.exp(u + k[:, t])
        y[:, t] = ((past * v[:, :t]).sum(1) + now * v[:, t]) / (past.sum(1) + now)
    return y


def test_reference_is_the_formula():
    w, u, k, v, _, _ = inputs(2, 9, 5, state=False, reset=False, dtype=torch.float64)
    torch.testing.assert_close(reference.wkv4(w, u, k, v)[0], naive(w, u, k, v), rtol=1e-12, atol=1e-12)  # fp64 rounding


def test_reference_gradients_are_the_finite_differences():
    w, u, k, v, first, starts = inputs(2, 4, 3, dtype=torch.float64)

    def y(w, u, k, v, a, b):
        return reference.wkv4(w, u, k, v, torch.stack([a, b, first[:, 2]], 1), starts)[0]

    assert torch.autograd.gradcheck(y, [x.requires_grad_() for x in (w, u, k, v, first[:, 0].clone(), first[:, 1].clone())])


def test_gradient_through_a_carried_state_is_exact():
    w, u, k, v, _, _ = inputs(2, 12, 3, state=False, reset=False, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (w, u, k, v)]
    whole = torch.autograd.grad(reference.wkv4(*leaves)[0].sin().sum(), leaves)
    y1, state = reference.wkv4(w, u, k[:, :5], v[:, :5])
    y2, _ = reference.wkv4(w, u, k[:, 5:], v[:, 5:], state)
    pieces = torch.autograd.grad(torch.cat([y1, y2], 1).sin().sum(), leaves)
    torch.testing.assert_close(whole, pieces, rtol=1e-10, atol=1e-10)  # fp64 rounding


@settings(max_examples=40, deadline=None)
@given(
    batch=st.sampled_from([1, 2, 5]),
    length=st.sampled_from([1, 2, 31, 32, 33, 64, 97]),
    channels=st.sampled_from([1, 3, 16, 33, 64, 65, 130]),
    scale=st.sampled_from([0.1, 1.0, 10.0, 80.0]),
    state=st.booleans(),
    reset=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_compiled_unit_equals_reference(batch, length, channels, scale, state, reset, seed):
    arguments = inputs(batch, length, channels, scale=scale, state=state, reset=reset, seed=seed)
    in_fp64 = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    fast, slow, truth = (
        outputs_and_gradients(impl, *x) for impl, x in (("cpu", arguments), ("reference", arguments), ("reference", in_fp64))
    )
    w, u, k, _, first, _ = arguments
    largest = sum(float(x.abs().max()) for x in (w, u, k, *([first[:, 2]] if state else [])))
    # An exponent x is rounded to a share 2^-24 of itself, which is 2^-24 |x| of e^x: with keys of ±80 that is most of the error.
    share = 1e-5 + 4 * 2**-24 * largest
    for name in truth:
        inside = truth[name].abs() < 1e37  # the running maximum of an empty state is no number to compare
        exact = truth[name][inside]
        fast_error, slow_error = ((x[name][inside] - exact).abs().amax().item() if exact.numel() else 0.0 for x in (fast, slow))
        size = max(1.0, exact.abs().amax().item() if exact.numel() else 0.0)
        if name == "gw":  # a sum over time of terms as large as the state, which cancel
            size = max(size, length * truth["state"][:, :2].abs().amax().item())
        # a share of the largest element, and twice what the fp32 loop itself is off
        assert fast_error <= share * size + 2 * slow_error, name


def test_long_sequences_agree():
    arguments = inputs(1, 4097, 3, reset=False)
    fast, slow = outputs_and_gradients("cpu", *arguments), outputs_and_gradients("reference", *arguments)
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-4, atol=1e-4, msg=name)  # gw sums 4097 terms in fp32, in another order


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_pieces_with_carried_state_equal_the_whole(impl):
    w, u, k, v, first, starts = inputs(2, 70, 20)
    whole, last = wkv4(w, u, k, v, first, starts, impl=impl)
    for cuts in ([1] * 70, [33, 37], [69, 1]):
        state, pieces = first, []
        for k1, v1, r1 in zip(k.split(cuts, 1), v.split(cuts, 1), starts.split(cuts, 1), strict=True):
            y, state = wkv4(w, u, k1, v1, state, r1, impl=impl)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)  # the same operations
        torch.testing.assert_close(state, last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_reset_makes_documents_independent(impl):
    w, u, k, v, first, _ = inputs(1, 20, 8, reset=False)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, 7] = True
    together, _ = wkv4(w, u, k, v, first, starts, impl=impl)
    alone, _ = wkv4(w, u, k[:, 7:], v[:, 7:], impl=impl)
    torch.testing.assert_close(together[:, 7:], alone, rtol=1e-6, atol=1e-6)  # the same operations


def test_compiled_unit_is_deterministic():
    arguments = inputs(3, 100, 70)
    first, second = (outputs_and_gradients("cpu", *arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bf16_in_bf16_out_with_fp32_inside():
    w, u, k, v, _, _ = inputs(2, 40, 30, state=False, reset=False)
    k, v = k.bfloat16(), v.bfloat16()
    y, state = wkv4(w, u, k, v, impl="cpu")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = reference.wkv4(w, u, k.float(), v.float())
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=1e-6)  # bf16 keeps 8 significant bits


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    w, u, k, v, _, _ = inputs(1, 5, 4, state=False, reset=False)
    k[0, 2, 1] = bad
    assert torch.equal(wkv4(w, u, k, v, impl="cpu")[0].isnan(), wkv4(w, u, k, v, impl="reference")[0].isnan())
    assert wkv4(w, u, k, v, impl="cpu")[0].isnan().any()


def test_empty_state_is_no_state():
    w, u, k, v, _, _ = inputs(2, 10, 4, state=False, reset=False)
    assert torch.equal(wkv4(w, u, k, v)[0], wkv4(w, u, k, v, empty_state(2, 4))[0])


def test_shapes_that_do_not_fit_are_refused():
    w, u, k, v, first, starts = inputs(2, 5, 4)
    with pytest.raises(ValueError, match=r"w must be \[4\]"):
        wkv4(w[:3], u, k, v)
    with pytest.raises(ValueError, match=r"state must be \[2, 3, 4\]"):
        wkv4(w, u, k, v, first[:1])
    with pytest.raises(ValueError, match=r"reset must be \[2, 5\]"):
        wkv4(w, u, k, v, None, starts[:, :4])
    with pytest.raises(ValueError, match="alike"):
        wkv4(w, u, k, v[:, :4])
    with pytest.raises(ValueError, match="not one of auto, cpu, reference"):
        wkv4(w, u, k, v, impl="fast")


def test_auto_takes_the_compiled_unit(monkeypatch):
    monkeypatch.setattr(reference, "wkv4", lambda *_: pytest.fail("auto fell back to the reference"))
    wkv4(*inputs(1, 3, 2)[:4])


def test_auto_says_why_it_is_slow(monkeypatch):
    monkeypatch.setattr(native, "refusal", lambda: "it is not compiled for torch 0.0; run: make kernels")
    with pytest.warns(UserWarning, match=r"refused(?s:.)*cpu: it is not compiled for torch 0.0; run: make kernels"):
        y, _ = wkv4(*inputs(1, 3, 2)[:4])
    assert y.shape == (1, 3, 2)
    with pytest.raises(RuntimeError, match="make kernels"):
        wkv4(*inputs(1, 3, 2)[:4], impl="cpu")


def test_a_missing_or_stale_library_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "library", lambda: tmp_path / "wkv4_cpu.so")
    assert "make kernels" in build.refusal()
    (tmp_path / "wkv4_cpu.json").write_text('{"source_hash": "0123456789abcdef"}')
    assert "compiled from other sources" in build.refusal()
    (tmp_path / "wkv4_cpu.json").write_text(f'{{"source_hash": "{build.source_hash()}"}}')
    assert build.refusal() is None


def test_fp64_goes_to_the_reference():
    arguments = inputs(1, 3, 2, dtype=torch.float64)[:4]
    with pytest.warns(UserWarning, match="fp64"):
        y, _ = wkv.wkv4(*arguments)
    assert y.dtype == torch.float64
