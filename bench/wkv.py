"""The compiled WKV unit against the reference loop and against its own exponentials, in one run.

    python bench/wkv.py [B T C]

Forward and backward in fp32. The floor is a loop that only does the same number of vectorised exponentials (2 forward, 3 backward
per token and channel: one is recomputed).
"""

import sys
import time
from collections.abc import Callable

import torch

from rwkv.wkv import wkv4


def seconds(run: Callable[[], object], least: float = 1.0) -> float:
    """Best of repeated runs, over at least `least` seconds: other work on the machine only ever adds."""
    run()
    best, until = float("inf"), time.perf_counter() + least
    while time.perf_counter() < until:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def main(batch: int, length: int, channels: int) -> None:
    torch.manual_seed(0)
    w, u = -torch.exp(torch.randn(channels)), torch.randn(channels)
    k, v = (torch.randn(batch, length, channels, requires_grad=True) for _ in range(2))
    exponents = -torch.rand(batch * length * channels)

    def step(impl: str) -> None:
        y, _ = wkv4(w, u, k, v, impl=impl)
        y.backward(torch.ones_like(y))

    compiled, loop = seconds(lambda: step("cpu")), seconds(lambda: step("reference"))
    floor = seconds(lambda: [torch.exp(exponents) for _ in range(5)])
    count = batch * length * channels
    print(f"B{batch} T{length} C{channels}, fp32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"compiled {compiled * 1e3:8.2f} ms   {5 * count / compiled / 1e9:.2f} G exponentials/s, {32 * count / compiled / 1e9:.1f} GB/s of k, v, y and gradients"
    )
    print(f"loop     {loop * 1e3:8.2f} ms   {loop / compiled:.0f} × compiled")
    print(f"floor    {floor * 1e3:8.2f} ms   compiled is {compiled / floor:.1f} × its exponentials alone")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or (1, 1024, 768)))
