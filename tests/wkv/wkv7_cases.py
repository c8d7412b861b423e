"""Random inputs of the WKV operator of RWKV-7, and the accuracy required of an implementation."""

import math

import torch

NAMES = ("gr", "gw", "gk", "gv", "ga", "gb", "gstate", "ginitial")


def inputs(batch, length, heads, size, *, scale=1.0, seed=0):
    """r, w, k, v, a, b as in the model; `scale` of the decay before its sigmoid."""
    g = torch.Generator().manual_seed(seed)
    r, z, k, v, removal, rate = (torch.randn(batch, length, heads, size, generator=g) for _ in range(6))
    removal = torch.nn.functional.normalize(removal, dim=-1)
    w = -math.exp(-0.5) * torch.sigmoid(z * scale)
    return [r, w, k, v, -removal, removal * torch.sigmoid(rate)]


def states(batch, heads, size, seed=1):
    return torch.randn(batch, heads, size, size, generator=torch.Generator().manual_seed(seed))


def starts(batch, length, share=0.2, seed=2):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


def outputs_and_gradients(run, tensors, state=None, reset=None, initial=None, dtype=None):
    """y, the last state, and all gradients, for random gradients of both outputs."""
    leaves = [
        None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in (*tensors, state, initial)
    ]
    y, last = run(*leaves[:6], state=leaves[6], reset=reset, initial=leaves[7])
    g = torch.Generator().manual_seed(3)
    gy, glast = (torch.randn(x.shape, generator=g, dtype=torch.float64).to(y.device) for x in (y, last))
    ((gy * y).sum() + (glast * last).sum()).backward()
    found = {name: x.grad for name, x in zip(NAMES, leaves, strict=True) if x is not None}
    return {"y": y.detach(), "state": last.detach(), **found}


def assert_close(fast, truth, share=4e-6):
    """Errors relative to the largest element: fp32 rounding over the steps that a state lasts."""
    for name, exact in truth.items():
        error = float((fast[name].double() - exact).abs().max())
        assert error <= share * max(1.0, float(exact.abs().max())), f"{name}: {error}"


def in_fp64(tensors, state=None, reset=None, initial=None):
    """As outputs_and_gradients, by the loop over time in fp64."""
    from rwkv.wkv.wkv7 import reference

    def loop(*tensors, state, reset, initial):
        return reference.wkv7(*tensors, state, reset, initial)

    return outputs_and_gradients(loop, tensors, state, reset, initial, torch.float64)


def assert_half_is_rounded_fp32(run, dtype, tensors, state):
    """bf16 and fp16 compute in fp32: the results are those for the same inputs, rounded once."""
    r, w, *others = tensors
    rounded = [r.to(dtype), w, *(x.to(dtype) for x in others)]
    results = []
    for kind in (dtype, torch.float32):
        leaves = [x.detach().to(torch.float32 if x is w else kind).requires_grad_() for x in rounded]
        y, last = run(*leaves, state=state, reset=None, initial=None)
        assert (y.dtype, last.dtype) == (kind, torch.float32)
        gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype).to(y.device, kind)
        results.append([y.detach(), last.detach(), *torch.autograd.grad(y, leaves, gy)])
    for name, half, full in zip(("y", "state", *NAMES), *results, strict=False):
        assert torch.equal(half, full.to(half.dtype)), name
