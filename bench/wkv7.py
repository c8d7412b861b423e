"""Benchmark the WKV7 CPU kernels against the reference loop and against matmuls.

    python bench/wkv7.py [B T C]

Forward and backward with heads of 64 channels, by the operator (including autograd) and by the
kernels alone, in a process with the CPU settings of training. Operations are those of the
recurrence: a token and head of N channels takes 9 N² forward (S a: 2, decay and two outer products:
5, S r: 2) and 25 N² backward (the recomputed states: 7, the gradients of r, k, v, a, b, w and of
the state: 18). They are compared with the operations of fp32 matmuls, 512 × 768 × 768, on the same
threads.
"""

import sys
import time
from collections.abc import Callable

import torch
from wkv import interleaved

from rwkv.kernels import load
from rwkv.kernels.linear import linear_forward
from rwkv.train.runtime import cpu
from rwkv.wkv.wkv7 import native, wkv7

N = 64
OPERATIONS = {"forward": 9, "backward": 25}  # times N², per token and head


def main(batch: int, length: int, channels: int) -> None:
    cpu.prepare()
    if reason := load.why_unavailable():
        sys.exit(reason)
    torch.manual_seed(0)
    heads = channels // N
    r, k, v, b, gy = (torch.randn(batch, length, heads, N) for _ in range(5))
    removal = torch.nn.functional.normalize(b, dim=-1)
    inputs = [r, -0.6 * torch.rand_like(r), k, v, -removal, removal * torch.rand_like(r)]
    half = [x if i == 1 else x.bfloat16() for i, x in enumerate(inputs)]  # w stays fp32

    def operator(tensors: list[torch.Tensor], impl: str) -> Callable[[], object]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        return lambda: torch.autograd.grad(wkv7(*leaves, impl=impl)[0], leaves, gy.to(leaves[0].dtype))

    def kernels(tensors: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
        saved = native.cpu_kernels(r).forward(*tensors, None, None, None)[-1]
        g = gy.to(tensors[0].dtype)
        return {
            "forward": lambda: native.cpu_kernels(r).forward(*tensors, None, None, None),
            "backward": lambda: native.cpu_kernels(r).backward(*tensors, None, None, saved, g, None),
        }

    x, weight = torch.randn(512, 768), torch.randn(768, 768)
    runs = {"matmul": lambda: linear_forward(x, weight)}
    for name, tensors in (("fp32", inputs), ("bf16", half)):
        runs |= {f"{part} {name}": run for part, run in kernels(tensors).items()}
        runs[f"operator {name}"] = operator(tensors, "cpu")
    best, _ = interleaved(runs, rounds=10, row=3)
    started = time.perf_counter()
    operator(inputs, "reference")()
    loop = (time.perf_counter() - started) * 1e3
    vectors = torch.ops.rwkv.cpu_vectors("")
    print(f"B{batch} T{length} C{channels}, {torch.get_num_threads()} threads, {vectors}, torch {torch.__version__}")
    peak = 2 * 512 * 768 * 768 / best["matmul"] / 1e6
    print(f"matmul         {best['matmul']:8.3f} ms  {peak:6.1f} GFLOP/s")
    for name, ms in best.items():
        if (part := name.split()[0]) in OPERATIONS:
            speed = OPERATIONS[part] * N * N * batch * length * heads / ms / 1e6
            print(f"{name:14} {ms:8.3f} ms  {speed:6.1f} GFLOP/s, {100 * speed / peak:.0f} % of a matmul's")
    for name in ("fp32", "bf16"):
        print(f"operator {name}  {best[f'operator {name}']:8.3f} ms")
    print(f"loop fp32      {loop:8.1f} ms  {loop / best['operator fp32']:.0f} × operator fp32")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or (1, 1024, 768)))
