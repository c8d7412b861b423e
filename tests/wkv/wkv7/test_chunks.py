"""The WY form of WKV7 computes the recurrence, and its gradient is that of the loop over time."""

import pytest
import torch
import wkv7_chunks
from wkv7_cases import inputs, starts, states

from rwkv.wkv.wkv7 import reference


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
@pytest.mark.parametrize(("length", "size"), [(1, 16), (16, 16), (37, 16), (64, 32)])
def test_formulas(length, size, share, scale):
    tensors = [x.double() for x in inputs(2, length, 2, 16, scale=scale)]
    state, initial = (states(2, 2, 16, seed).double() for seed in (1, 4))
    reset = starts(2, length, share)
    leaves = [x.requires_grad_() for x in (*tensors, state, initial)]
    y, last = reference.wkv7(*leaves[:7], reset, leaves[7])
    g = torch.Generator().manual_seed(3)
    gy, gstate = (torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (y, last))
    truth = [y, last, *torch.autograd.grad((gy * y).sum() + (gstate * last).sum(), leaves, allow_unused=True)]
    truth[-1] = torch.zeros_like(initial) if truth[-1] is None else truth[-1]
    with torch.no_grad():
        found = wkv7_chunks.wkv7(*leaves[:7], reset, leaves[7], gy, gstate, size)
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()) + 1e-12)
