"""Inputs of the operator, and how far an implementation may be from the truth."""

import torch


def inputs(batch, length, channels, *, scale=1.0, state=True, reset=True, initial=False, seed=0, dtype=torch.float32):
    """w, u, k, v, state, reset, initial: keys, bonuses and the states' maxima of size `scale`, decays from e^-6 to e^6 or so."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    w, u = -torch.exp(normal(channels) * 2), normal(channels) * scale
    k, v = normal(batch, length, channels) * scale, normal(batch, length, channels)

    def random_state():
        numerator, denominator = normal(batch, channels), normal(batch, channels).abs() + 0.1
        return torch.stack([numerator, denominator, normal(batch, channels) * scale], 1)

    first = random_state() if state else None
    starts = torch.rand(batch, length, generator=g) < 0.2 if reset else None
    return w, u, k, v, first, starts, random_state() if initial else first


def in_fp64(arguments):
    wide = {id(x): x.double() for x in arguments if x is not None and x.is_floating_point()}
    return [wide.get(id(x), x) for x in arguments]  # one tensor stays one


def running_maximum(w, k, first, starts, initial):
    """The state's p after the last token, [B, C] fp64: what its numerator and denominator are a multiple of, without the rounding of every step."""
    empty = torch.full_like(k[:, 0], -1e38, dtype=torch.float64)
    p, start = (empty if state is None else state[:, 2].double() for state in (first, initial))
    for t in range(k.shape[1]):
        if starts is not None:
            p = torch.where(starts[:, t, None], start, p)
        p = torch.maximum(p + w.double(), k[:, t].double())
    return p


def outputs_and_gradients(wkv4, w, u, k, v, first, starts, initial):
    """Every output, and every gradient for random gradients of the outputs: the same ones, whatever the outputs' rounding is, and of one sign,
    so that sums over time stay as large as their terms.

    The state's numerator and denominator are given as multiples of the exact e^p, as which of two states' p is rounded is nobody's error.
    """
    leaves = [None if x is None else x.clone().requires_grad_() for x in (w, u, k, v, first)]
    other = initial is not first  # else the operator's gradient of `first` is that of both
    leaves.append(initial.clone().requires_grad_() if other else leaves[4])
    y, last = wkv4(*leaves[:5], starts, leaves[5])
    scale = torch.exp(last[:, 2].detach().double() - running_maximum(w, k, first, starts, initial))[:, None]
    state = last[:, :2].double() * scale
    g = torch.Generator().manual_seed(1)
    gy, gstate = ((torch.rand(x.shape, generator=g, dtype=torch.float64) + 0.5).to(y.device) for x in (y, state))
    ((gy * y).sum() + (gstate * state).sum()).backward()
    names = ("gw", "gu", "gk", "gv", "gstate", "ginitial")[: 5 + other]
    gradients = {name: x.grad for name, x in zip(names, leaves, strict=False) if x is not None and x.grad is not None}
    return {"y": y.detach(), "state": state.detach(), "p": last[:, 2].detach(), **gradients}


def assert_close(fast, slow, truth, arguments, share=1e-5):
    """`fast` is within a share of the largest element of `truth` (fp64), and twice what the fp32 loop `slow` itself is off.

    An exponent x is rounded to a share 2^-24 of itself, which is 2^-24 |x| of e^x: with keys of ±80 that is most of the error.
    """
    for name, (error, allowed) in errors(fast, slow, truth, arguments, share).items():
        assert error <= allowed, f"{name}: off by {error}, allowed {allowed}"


def errors(fast, slow, truth, arguments, share=1e-5):
    """{name: (how far `fast` is off, how far it may be)}, as assert_close says."""
    w, u, k, _, first, _, initial = arguments
    length = k.shape[1]
    largest = sum(
        float(x.abs().max()) for x in (w, u, k, *(state[:, 2] for state in (first, initial) if state is not None))
    )
    found = {}
    for name, exact in truth.items():
        fast_error, slow_error = ((x[name].double() - exact.double()).abs().amax().item() for x in (fast, slow))
        size = max(1.0, exact.abs().amax().item())
        if name == "ginitial":  # a sum over the starts
            size *= 2
        if name == "gw":  # a sum over time of terms as large as the state, which cancel
            size = 2 * max(size, length * truth["state"].abs().amax().item())
        found[name] = fast_error, (share + 4 * 2**-24 * largest) * size + 2 * slow_error
    return found


def assert_half_is_rounded_fp32(wkv4, dtype, arguments):
    """In bf16 and fp16 the arithmetic is that of fp32 on the same numbers: outputs and gradients differ by the last rounding alone."""
    w, u, k, v, first, starts, _ = arguments
    gy, gstate = torch.randn_like(k).to(dtype), torch.randn(k.shape[0], 3, k.shape[2], device=k.device)
    results = []
    for kind in (dtype, torch.float32):
        leaves = [
            x.detach().clone().requires_grad_() for x in (w, u, k.to(dtype).to(kind), v.to(dtype).to(kind), first)
        ]
        y, last = wkv4(*leaves, starts, leaves[4])
        assert (y.dtype, last.dtype) == (kind, torch.float32)
        results.append([y.detach(), last.detach(), *torch.autograd.grad((y, last), leaves, (gy.to(kind), gstate))])
    for name, half, full in zip(("y", "state", "gw", "gu", "gk", "gv", "gstate"), *results, strict=True):
        assert torch.equal(half, full.to(half.dtype)), name
