"""The compiled WKV7 operator matches the reference in float64 (see also test_heads.py)."""

import torch
from head_cases import WKV7, inputs7, starts, states
from hypothesis import given, settings
from hypothesis import strategies as st

inputs, loop, check = inputs7, WKV7.loop, WKV7.check


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


def test_zero_removal_key():
    r, w, k, v, a, b = inputs(1, 20, 1, 64)
    a[:, 5], b[:, 5], b[:, 7] = 0, 0, 0
    check([r, w, k, v, a, b])
