"""How far the implementations used on a device differ from the references, on a few inputs."""

from typing import Any

import torch
from torch import Tensor

from rwkv.wkv import wkv4, wkv6, wkv7
from rwkv.wkv.wkv4 import reference as reference4
from rwkv.wkv.wkv6 import reference as reference6
from rwkv.wkv.wkv7 import reference as reference7
from rwkv.wkv.wkv7.time_mix import Parameters, Projections, time_mix


def of_wkv(device: torch.device) -> float:
    """The largest difference of outputs and gradients of WKV4, WKV6 (with a decay by token, and as
    in RWKV-5 with one for all tokens) and WKV7 in fp32, relative to the largest element of each.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    decays = -torch.rand(70, generator=generator)
    error = _largest(reference4.wkv4, wkv4, [decays, normal(70), normal(2, 100, 70), normal(2, 100, 70)], device)
    r, w, k, v, b = (normal(2, 40, 2, 32) for _ in range(5))
    w, b = -w.sigmoid(), torch.nn.functional.normalize(b, dim=-1)
    error = max(error, _largest(reference7.wkv7, wkv7, [r, w, k, v, -b, 0.5 * b], device))
    for decay in (w, w[0, 0]):
        error = max(error, _largest(reference6.wkv6, wkv6, [r, decay, k, v, normal(2, 32)], device))
    return error


def of_time_mix(device: torch.device) -> float:
    """As `of_wkv`, of RWKV-7's time-mix.

    Raises:
        RuntimeError: a kernel cannot be launched.
    """
    shapes = [(2, 40, 64)] * 8 + [(64,)] * 2 + [(2, 32)] + [(64,)] * 5 + [(2, 2, 32, 32)]
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]

    def run(impl: str) -> Any:
        return lambda *x: time_mix(Projections(*x[:7]), x[7], Parameters(*x[8:16]), x[16], eps=64e-5, impl=impl)

    return _largest(run("reference"), run("auto"), inputs, device)


def _largest(expected: Any, run: Any, inputs: list[Tensor], device: torch.device) -> float:
    """The largest difference of `run` on a device from `expected` on the CPU."""
    results = []
    for function, place in ((expected, torch.device("cpu")), (run, device)):
        leaves = [x.to(place).requires_grad_() for x in inputs]
        y, _ = function(*leaves)
        results.append([x.cpu() for x in (y.detach(), *torch.autograd.grad(y.sin().sum(), leaves))])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*reversed(results), strict=True))
