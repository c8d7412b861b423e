"""The time-mix of RWKV-7 between its linear layers: inputs, and checks of an implementation."""

import torch

from rwkv.wkv.wkv7.time_mix import Parameters, Projections, time_mix

EPS = 64e-5


def inputs(first_block=False, B=2, T=21, H=3, N=16, seed=0, dtype=torch.float32):
    """Projections, v_first, parameters, state."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    C = H * N
    x = Projections(*(normal(B, T, C).to(dtype) for _ in range(7)))
    p = Parameters(normal(C), normal(C), normal(H, N), *(normal(1, 1, C) for _ in range(5)))
    v_first = normal(B, T, C).to(dtype)
    if first_block:
        x, p, v_first = x._replace(mix=None), p._replace(v0=None), None
    return x, v_first, p, normal(B, H, N, N)


def resets(B=2, T=21):
    return torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.2


def outputs_and_gradients(x, v_first, p, state, reset=None, wanted=lambda name: True, dtype=None, impl="cpu"):
    named = {"v_first": v_first, "state": state, **x._asdict(), **p._asdict()}
    named = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(wanted(name))
        for name, t in named.items()
    }
    x, p = (type(kind)(**{name: named[name] for name in kind._fields}) for kind in (x, p))
    y, last = time_mix(x, named["v_first"], p, named["state"], reset, eps=EPS, impl=impl)
    g = torch.Generator().manual_seed(2)
    gy, glast = (torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (y, last))
    ((gy * y).sum() + (glast * last).sum()).backward()
    return {"y": y.detach(), "last": last.detach()} | {
        name: t.grad for name, t in named.items() if t is not None and wanted(name)
    }


def assert_close(fast, truth, share=1e-5):
    """Errors relative to the largest element: fp32 rounding."""
    assert fast.keys() == truth.keys()
    for name, exact in truth.items():
        error = float((fast[name].double() - exact).abs().max())
        assert error <= share * max(1.0, float(exact.abs().max())), f"{name}: {error}"


def gradients_of_single_inputs(wanted):
    """Only what requires a gradient gets one: e.g. in block 0 of a LoRA run."""
    given = inputs()
    every = outputs_and_gradients(*given)
    some = outputs_and_gradients(*given, wanted=lambda name: name in wanted.split(","))
    assert some.keys() == {"y", "last", *wanted.split(",")}
    assert all(torch.equal(some[name], every[name]) for name in some)


def half_precision(dtype):
    """Everything but the inputs of WKV is computed in fp32."""
    given = inputs(dtype=dtype)
    half = outputs_and_gradients(*given)
    assert half["y"].dtype == half["k"].dtype == dtype
    assert half["last"].dtype == half["w0"].dtype == torch.float32
    truth = outputs_and_gradients(*given, dtype=torch.float64, impl="reference")
    assert_close(half, truth, share=0.03)  # bf16 has 8 bits, and WKV's inputs and outputs are rounded to it


def zero_key_and_zero_output():
    """A key of zeros has a zero removal key; y of zeros is normalised to zeros. Gradients are
    finite.
    """
    x, v_first, p, state = inputs(first_block=True)
    x.k[:, 0] = x.v[:, 0] = 0
    found = outputs_and_gradients(x, v_first, p, torch.zeros_like(state))
    assert all(t.isfinite().all() for t in found.values())
    torch.testing.assert_close(found["y"][:, 0], p.ln_bias * x.g[:, 0])


def decays_near_both_ends():
    x, v_first, p, state = inputs()
    x.w[:, ::2], x.w[:, 1::2] = 20.0, -20.0
    truth = outputs_and_gradients(x, v_first, p, state, dtype=torch.float64, impl="reference")
    assert_close(outputs_and_gradients(x, v_first, p, state), truth)
