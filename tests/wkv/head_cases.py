"""Operators with a matrix-valued state by head (WKV6, WKV7): random inputs, and the accuracy
required of an implementation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rwkv.wkv import wkv6, wkv7
from rwkv.wkv.wkv6 import reference as reference6
from rwkv.wkv.wkv7 import reference as reference7


def inputs6(batch, length, heads, size, *, scale=1.0, constant=False, seed=0):
    """r, w, k, v, u as in the model; `scale` of the logarithm of the log-decay."""
    g = torch.Generator().manual_seed(seed)
    r, k, v = (torch.randn(batch, length, heads, size, generator=g) for _ in range(3))
    raw = torch.randn(*(() if constant else (batch, length)), heads, size, generator=g)
    return [r, -torch.exp(scale * raw), k, v, torch.randn(heads, size, generator=g)]


def decays_at_both_ends(like):
    """Log-decays of this shape in random order: from e^(−8100), which is 0 in fp32, to 1 − 6e-6."""
    order = torch.randperm(like.numel(), generator=torch.Generator().manual_seed(0))
    return -torch.exp(torch.linspace(-12, 9, like.numel())[order]).view_as(like)


def inputs7(batch, length, heads, size, *, scale=1.0, seed=0):
    """r, w, k, v, a, b as in the model; `scale` of the decay before its sigmoid."""
    g = torch.Generator().manual_seed(seed)
    r, z, k, v, removal, rate = (torch.randn(batch, length, heads, size, generator=g) for _ in range(6))
    removal = torch.nn.functional.normalize(removal, dim=-1)
    w = -math.exp(-0.5) * torch.sigmoid(z * scale)
    return [r, w, k, v, -removal, removal * torch.sigmoid(rate)]


@dataclass(frozen=True)
class Operator:
    """
    Attributes:
        name: of the operator, and of its function in `reference`.
        function: of rwkv.wkv.
        implementations: of `function`, in the order of "auto".
        reference: the module of the loop over time.
        inputs: (batch, length, heads, size) -> its tensors.
        by_token: how many of these tensors have a time axis; the others come after them.
        interval: tokens per saved state.
        atol: of outputs whose tokens are split otherwise. (WKV6's are larger than WKV7's.)
    """

    name: str
    function: Callable
    implementations: str
    reference: object
    inputs: Callable
    by_token: int
    interval: int
    atol: float

    def cpu(self, *tensors, state=None, reset=None, initial=None):
        return self.function(*tensors, state, reset, initial=initial, impl="cpu")

    def loop(self, *tensors, state=None, reset=None, initial=None):
        return getattr(self.reference, self.name)(*tensors, state, reset, initial)

    def in_fp64(self, tensors, state=None, reset=None, initial=None):
        """As outputs_and_gradients, by the loop over time in fp64."""
        return outputs_and_gradients(self.loop, tensors, state, reset, initial, torch.float64)

    def check(self, tensors, state=None, reset=None, initial=None):
        """The CPU kernels match the loop in fp64."""
        fast = outputs_and_gradients(self.cpu, tensors, state, reset, initial)
        assert_close(fast, self.in_fp64(tensors, state, reset, initial))


WKV6 = Operator(
    "wkv6", wkv6, "cuda, cpu, reference, cuda-chunk", reference6, inputs6, by_token=4, interval=64, atol=1e-5
)
WKV7 = Operator(
    "wkv7", wkv7, "cuda, cpu, reference, cuda-chunk", reference7, inputs7, by_token=6, interval=16, atol=1e-6
)


def states(batch, heads, size, seed=1):
    return torch.randn(batch, heads, size, size, generator=torch.Generator().manual_seed(seed))


def starts(batch, length, share=0.2, seed=2):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


STATES_AND_RESETS = ["none", "reset", "state, reset", "state, reset, initial", "reset, initial"]


def states_and_resets(given, batch, length, heads, size):
    """The state, the resets and the initial state; None for those not in `given`."""
    return (
        states(batch, heads, size) if "state" in given else None,
        starts(batch, length) if "reset" in given else None,
        states(batch, heads, size, 4) if "initial" in given else None,
    )


def names(tensors):
    """Of the gradients of an operator's tensors, the state and the initial state."""
    return [f"g{name}" for name in ("rwkvu" if len(tensors) == 5 else "rwkvab")] + ["gstate", "ginitial"]


def outputs_and_gradients(run, tensors, state=None, reset=None, initial=None, dtype=None):
    """y, the last state, and all gradients, for random gradients of both outputs."""
    leaves = [
        None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in (*tensors, state, initial)
    ]
    y, last = run(*leaves[:-2], state=leaves[-2], reset=reset, initial=leaves[-1])
    g = torch.Generator().manual_seed(3)
    gy, glast = (torch.randn(x.shape, generator=g, dtype=torch.float64).to(y.device) for x in (y, last))
    ((gy * y).sum() + (glast * last).sum()).backward()
    found = {name: x.grad for name, x in zip(names(tensors), leaves, strict=True) if x is not None}
    return {"y": y.detach(), "state": last.detach(), **found}


def assert_close(fast, truth, share=4e-6):
    """Errors relative to the largest element: fp32 rounding over the steps that a state lasts."""
    for name, exact in truth.items():
        error = float((fast[name].double() - exact).abs().max())
        assert error <= share * max(1.0, float(exact.abs().max())), f"{name}: {error}"


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
    for name, half, full in zip(("y", "state", *names(tensors)), *results, strict=False):
        assert torch.equal(half, full.to(half.dtype)), name
