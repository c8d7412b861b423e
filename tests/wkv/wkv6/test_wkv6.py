"""The compiled WKV6 operator matches the reference in float64 (see also test_heads.py), also with a
constant or recomputed decay.
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
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv.kernels.elementwise.recompute import checkpointed
from rwkv.wkv import wkv6

inputs, cpu, loop, check = inputs6, WKV6.cpu, WKV6.loop, WKV6.check


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_constant_decay_half_is_rounded_fp32(dtype):
    assert_half_is_rounded_fp32(cpu, dtype, inputs(2, 19, 2, 64, constant=True), states(2, 2, 64))


@pytest.mark.parametrize("constant", [False, True])
def test_decays_at_both_ends(constant):
    """Finite, and as the reference in float64."""
    tensors = inputs(1, 70, 2, 64, constant=constant)
    tensors[1] = decays_at_both_ends(tensors[1])
    found = outputs_and_gradients(cpu, tensors, states(1, 2, 64))
    assert all(x.isfinite().all() for x in found.values())
    check(tensors, states(1, 2, 64))


def test_constant_decay_is_the_same_decay_at_every_token():
    r, w, k, v, u = inputs(2, 70, 2, 32, constant=True)
    reset, first = starts(2, 70), states(2, 2, 32)
    once, every = (outputs_and_gradients(cpu, [r, x, k, v, u], first, reset) for x in (w, w.repeat(2, 70, 1, 1)))
    every["gw"] = every["gw"].sum((0, 1))
    assert_close(once, {name: x.double() for name, x in every.items()})


@pytest.mark.parametrize("recomputed", [False, True])
def test_recomputed_decay_is_not_saved(recomputed):
    """A decay that carries a Recompute is recomputed in the backward pass."""
    r, w, k, v, u = inputs(1, 70, 2, 16)
    leaf, saved = torch.log(-w).requires_grad_(), []
    decay = checkpointed(negative_exp, leaf) if recomputed else negative_exp(leaf)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        y, _ = cpu(r, decay, k, v, u)
    assert (decay.data_ptr() in saved) != recomputed
    found = torch.autograd.grad(y.sin().sum(), leaf)[0]
    (expected,) = torch.autograd.grad(cpu(r, negative_exp(leaf), k, v, u)[0].sin().sum(), leaf)
    assert torch.equal(found, expected)  # the same operations


def negative_exp(x):
    return -torch.exp(x)


def test_invalid_decay_and_bonus():
    r, w, k, v, u = inputs(2, 5, 2, 16)
    for message, arguments in {
        r"w must be \[2, 16\] .* got \[5, 2\]": (r, torch.zeros(5, 2), k, v, u),
        r"u must be \[2, 16\] .* got \[1, 16\]": (r, w, k, v, u[:1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            wkv6(*arguments)
