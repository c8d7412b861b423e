"""Random inputs of the WKV operator, and the accuracy required of an implementation."""

import torch


def inputs(batch, length, channels, *, scale=1.0, state=True, reset=True, initial=False, seed=0, dtype=torch.float32):
    """w, u, k, v, state, reset, initial. Keys, bonuses and the states' maxima have size `scale`,
    decay rates range from about e^-6 to e^6.
    """
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


def near_threshold(size):
    """Inputs with keys of ±`size` in every token, in some, or in the state only, which is far from
    the keys then.
    """
    w, u, k, v, first, *_ = inputs(2, 50, 40, reset=False)
    u, first[:, 2] = u.clamp(-1, 1), torch.where(first[:, 2] > 0, size, -size)
    keys = k.sign() * size, torch.full_like(k, size), torch.full_like(k, -size), k
    return [(w, u, x, v, first, None, first) for x in keys]


def strong_decay(size):
    """A large key and two small ones in turn, and a decay of less than e^-87 between them."""
    _, _, k, v, *_ = inputs(2, 48, 40, state=False, reset=False)
    k[:] = -size
    k[:, ::3] = size
    return torch.full((40,), -90.0), torch.zeros(40), k, v, None, None, None


def in_fp64(arguments):
    wide = {id(x): x.double() for x in arguments if x is not None and x.is_floating_point()}
    return [wide.get(id(x), x) for x in arguments]  # a tensor passed twice stays one tensor


def running_maximum(w, k, first, starts, initial):
    """The state's running maximum p after the last token, [B, C] in fp64, without the rounding of
    every step.
    """
    empty = torch.full_like(k[:, 0], -1e38, dtype=torch.float64)
    p, start = (empty if state is None else state[:, 2].double() for state in (first, initial))
    for t in range(k.shape[1]):
        if starts is not None:
            p = torch.where(starts[:, t, None], start, p)
        p = torch.maximum(p + w.double(), k[:, t].double())
    return p


def outputs_and_gradients(wkv4, w, u, k, v, first, starts, initial):
    """All outputs, and all gradients for random positive output gradients (positive, so that sums
    over time do not cancel).

    The state's numerator and denominator are rescaled to the exact e^p: the rounding of p is not an
    error.
    """
    leaves = [None if x is None else x.clone().requires_grad_() for x in (w, u, k, v, first)]
    other = initial is not first  # otherwise the gradient of `first` is the sum of both
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


ROUNDING = 2.0**-24  # of fp32
# The allowed root mean square error, in multiples of ROUNDING · (1 + |exponents|): over all
# elements, and within each channel. Measured on the CPU kernels with both stacks (240 random inputs
# of test_wkv.py's kinds): at most 4.7 and 17. The CUDA kernels, on a CPU, need at most 0.4 of the
# allowed errors.
RMS, CHANNEL = 12, 40
UNDERFLOW = 1e-36  # below it a term may be flushed to zero


def assert_close(fast, slow, truth, arguments, rtol=1e-5):
    """Check every output and gradient of `fast` against `truth` (fp64): the largest error relative
    to the largest element, the RMS of the error relative to the RMS, and the same within each
    channel, so that errors of small gradients are not hidden by large ones. Twice the error of the
    fp32 loop `slow` is allowed in addition.

    An exponent x is rounded to 2^-24 |x|, which changes e^x by as much, relatively: with keys of
    ±80 this is most of the error.
    """
    for name, checks in errors(fast, slow, truth, arguments, rtol).items():
        for check, (error, allowed) in checks.items():
            worst = int((error - allowed).argmax())
            assert bool((error <= allowed).all()), (
                f"{name}, {check} error (channel {worst}): {float(error[worst])}, allowed {float(allowed[worst])}"
            )


def errors(fast, slow, truth, arguments, rtol=1e-5):
    """{name: {check: (error, allowed error)}} of `assert_close`: tensors of one element, or one per
    channel.
    """
    w, u, k, v, first, _, initial = (None if x is None else x.double() for x in arguments)
    length = k.shape[1]
    exponents = w.abs() + u.abs() + _largest(k) + sum(_largest(x[:, 2:]) for x in (first, initial) if x is not None)
    largest = sum(float(x.abs().max()) for x in (w, u, k, *(x[:, 2] for x in (first, initial) if x is not None)))
    rounding = ROUNDING * (1 + exponents)

    # Sums may cancel. Their rounding is relative to their terms, here bounded from the gradients of
    # v, which with positive output gradients are sums of positive terms: gk sums gv (v - y), and gu
    # and gw sum such terms over time.
    terms = truth["gv"].abs() * (_largest(v) + _largest(truth["y"]))
    sums = {"y": _rms(v), "gk": _rms(terms), "gu": terms.sum((0, 1)), "gw": terms.sum((0, 1))}

    result = {}
    for name, exact in truth.items():
        error, loop_error = (x[name].double() - exact for x in (fast, slow))
        size = max(1.0, exact.abs().max().item())
        if name == "ginitial":  # a sum over resets
            size *= 2
        if name == "gw":  # a sum over time of terms as large as the state, which cancel
            size = 2 * max(size, length * truth["state"].abs().max().item())
        allowed = (rtol + 4 * ROUNDING * largest) * size + 2 * loop_error.abs().max()
        result[name] = {"largest": (error.abs().max()[None], allowed[None])}
        scale = rounding * (_rms(exact) + sums.get(name, 0)) + UNDERFLOW
        over_all = RMS * _rms(scale[:, None]) + 2 * _rms(loop_error.reshape(-1, 1))
        result[name]["RMS"] = _rms(error.reshape(-1, 1)), over_all
        result[name]["channel"] = _rms(error), CHANNEL * scale + 2 * _rms(loop_error)
    return result


def _largest(x):
    """The largest magnitude of each channel, [C]."""
    return x.abs().reshape(-1, x.shape[-1]).amax(0)


def _rms(x):
    """The root mean square of each channel, [C]."""
    return x.reshape(-1, x.shape[-1]).square().mean(0).sqrt()


def assert_half_is_rounded_fp32(wkv4, dtype, arguments):
    """bf16 and fp16 compute in fp32: outputs and gradients are the fp32 results for the same
    inputs, rounded once.
    """
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
