"""Benchmark the WKV6 and WKV7 CPU kernels against the reference loop and against matmuls.

    python bench/wkv_heads.py [B T C]

Forward and backward with heads of 64 channels, by the operator (including autograd) and by the
kernels alone, in a process with the CPU settings of training. Operations are those of the
recurrence, for a token and head of N channels; they are compared with the operations of fp32
matmuls, 512 × 768 × 768, on the same threads.

- WKV7: 9 N² forward (S a: 2, decay and two outer products: 5, S r: 2) and 25 N² backward (the
  recomputed states: 7, the gradients of r, k, v, a, b, w and of the state: 18)
- WKV6: 5 N² forward (rᵀ S: 2, decay and outer product: 3) and 14 N² backward (the recomputed
  states: 3, the gradients of r, k, v, w and of the state: 11); also with a constant decay (RWKV-5)
"""

import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from wkv import interleaved

from rwkv.kernels import load
from rwkv.kernels.linear import linear_forward
from rwkv.train.runtime import cpu
from rwkv.wkv import wkv6, wkv7
from rwkv.wkv.wkv6 import native as native6
from rwkv.wkv.wkv7 import native as native7

N = 64


class Case(NamedTuple):
    operator: Callable[..., tuple[Tensor, Tensor]]
    native: ModuleType
    operations: dict[str, int]  # times N², per token and head
    inputs: list[Tensor]  # fp32
    in_fp32: tuple[int, ...]  # those that stay in fp32 in a bf16 model


def cases(shape: tuple[int, int, int, int]) -> dict[str, Case]:
    r, k, v, b = (torch.randn(shape) for _ in range(4))
    removal = torch.nn.functional.normalize(b, dim=-1)
    w, u = -torch.exp(torch.randn(shape)), torch.randn(shape[2:])
    operations6, operations7 = {"forward": 5, "backward": 14}, {"forward": 9, "backward": 25}
    inputs7 = [r, -0.6 * torch.rand_like(r), k, v, -removal, removal * torch.rand_like(r)]
    return {
        "wkv6": Case(wkv6, native6, operations6, [r, w, k, v, u], (1, 4)),
        "wkv6, constant decay": Case(wkv6, native6, operations6, [r, w[0, 0], k, v, u], (1, 4)),
        "wkv7": Case(wkv7, native7, operations7, inputs7, (1,)),
    }


def measure(case: Case, peak: float) -> None:
    gy = torch.randn_like(case.inputs[0])
    half = [x if i in case.in_fp32 else x.bfloat16() for i, x in enumerate(case.inputs)]

    def operator(tensors: list[Tensor], impl: str) -> Callable[[], object]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        return lambda: torch.autograd.grad(case.operator(*leaves, impl=impl)[0], leaves, gy.to(leaves[0].dtype))

    runs: dict[str, Callable[[], object]] = {}
    for name, tensors in (("fp32", case.inputs), ("bf16", half)):
        kernels, g = case.native.cpu_kernels(tensors[0]), gy.to(tensors[0].dtype)
        saved = kernels.forward(*tensors, None, None, None)[-1]
        runs[f"forward {name}"] = lambda f=kernels.forward, x=tensors: f(*x, None, None, None)
        runs[f"backward {name}"] = lambda f=kernels.backward, x=tensors, s=saved, g=g: f(*x, None, None, s, g, None)
        runs[f"operator {name}"] = operator(tensors, "cpu")
    best, _ = interleaved(runs, rounds=10, row=3)
    started = time.perf_counter()
    operator(case.inputs, "reference")()
    loop = (time.perf_counter() - started) * 1e3
    batch, length, heads, _ = gy.shape
    for name, ms in best.items():
        speed = case.operations.get(name.split()[0], 0) * N * N * batch * length * heads / ms / 1e6
        print(f"{name:14} {ms:8.3f} ms" + (f"  {speed:6.1f} GFLOP/s, {100 * speed / peak:.0f} %" if speed else ""))
    print(f"loop fp32      {loop:8.1f} ms  {loop / best['operator fp32']:.0f} × operator fp32", flush=True)


def main(batch: int, length: int, channels: int) -> None:
    cpu.prepare()
    if reason := load.why_unavailable():
        sys.exit(reason)
    torch.manual_seed(0)
    vectors = torch.ops.rwkv.cpu_vectors("")
    print(f"B{batch} T{length} C{channels}, {torch.get_num_threads()} threads, {vectors}, torch {torch.__version__}")
    x, weight = torch.randn(512, 768), torch.randn(768, 768)
    for name, case in cases((batch, length, channels // N, N)).items():
        best, _ = interleaved({"matmul": lambda: linear_forward(x, weight)}, rounds=10, row=3)
        peak = 2 * 512 * 768 * 768 / best["matmul"] / 1e6
        print(f"--- {name}; % of a matmul's {peak:.1f} GFLOP/s")
        measure(case, peak)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or (1, 1024, 768)))
