"""Benchmark the elementwise CUDA kernels: time, and speed as a share of a large copy.

    python bench/gpu/elementwise.py [--json FILE]

The share counts the bytes of every input and every output once.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timing import copy_speed, median_ms

from rwkv.kernels import gpu, load

SHAPES = ((8, 1024, 2048), (8, 1024, 5120), (1, 1024, 2048))  # batch, tokens, channels
LOSSES = ((256, 65536), (2048, 65536), (256, 50277), (2048, 50277))  # rows of a chunk, vocabulary
Case = tuple[str, float, Callable[[], object]]
"""Name, bytes moved, and the call."""


def block_cases(ops: gpu.CudaKernels, batch: int, tokens: int, width: int) -> Iterator[Case]:
    """The operations of a block, in bf16."""
    bf16 = torch.bfloat16
    x, g = (torch.randn(batch, tokens, width, device="cuda", dtype=bf16) for _ in range(2))
    k = torch.randn(batch * tokens, 4 * width, device="cuda", dtype=bf16)
    weight, bias = torch.randn(width, device="cuda"), torch.randn(width, device="cuda")
    weights, last = torch.rand(3, width, device="cuda"), torch.zeros(batch, width, device="cuda", dtype=bf16)
    total, seed = torch.zeros_like(x), torch.tensor(7, device="cuda")
    _, stats = ops.norm_forward(x, weight, bias, 1e-5, bf16)
    size = 2.0 * x.numel()
    yield "norm", 2 * size, lambda: ops.norm_forward(x, weight, bias, 1e-5, bf16)
    for trained in (False, True):
        name = "trained" if trained else "frozen"
        yield (
            f"norm backward, {name}",
            3 * size,
            lambda trained=trained: ops.norm_backward(g, x, weight, stats, trained),
        )
        yield (
            f"mix of 3 backward, {name}",
            (5 if trained else 4) * size,
            lambda trained=trained: ops.mix_backward([g, g, g], x, last, None, None, weights, trained),
        )
    yield "mix of 3", 4 * size, lambda: ops.mix_forward(x, last, None, None, weights)
    yield "gate", 3 * size, lambda: ops.gate_forward(x, g)
    yield "gate backward", 5 * size, lambda: ops.gate_backward(g, x, g)
    yield "relu2", 8 * size, lambda: ops.relu2_forward(k)
    yield "relu2 backward", 12 * size, lambda: ops.relu2_backward(k, k)
    yield "dropout", 2 * size, lambda: ops.dropout(x, seed, 0.01)
    yield "dropout, added", 3 * size, lambda: ops.dropout_add(total, x, seed, 0.01)


def head_cases(ops: gpu.CudaKernels, batch: int, tokens: int, width: int) -> Iterator[Case]:
    """The operations of a time-mix around WKV, in bf16: keys and gate of RWKV-7, gate and token
    shift of RWKV-6.
    """
    heads = width // 64
    x = [torch.randn(batch, tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    p = [torch.randn(heads, 64, device="cuda") for _ in range(5)]
    grads = [torch.randn(batch, tokens, width, device="cuda"), *x]
    size = 2.0 * x[0].numel()
    parts, last = torch.randn(5, *x[0].shape, device="cuda", dtype=torch.bfloat16), torch.zeros_like(x[0][:, 0])
    mix = torch.rand(5, width, device="cuda")
    yield "keys", 12 * size, lambda: ops.keys_forward(x, p)
    yield "shift of RWKV-6", 11 * size, lambda: ops.shift_forward(x[0], last, None, mix, parts, [], [], True)
    yield "gate of RWKV-7", 6 * size, lambda: ops.head_gate_forward(x[:5], p[:3], 64e-5)
    yield "gate of RWKV-6", 3 * size, lambda: ops.head_gate_forward(x[:2], p[:2], 64e-5)
    for trained in (False, True):
        name = "trained" if trained else "frozen"
        yield (
            f"shift backward, {name}",
            17 * size,
            lambda trained=trained: ops.shift_backward(x[:5], x[0], last, None, mix, parts, trained),
        )
        yield f"keys backward, {name}", 20 * size, lambda trained=trained: ops.keys_backward(grads, x, p, trained)
        yield (
            f"gate of RWKV-7 backward, {name}",
            11 * size,
            lambda trained=trained: ops.head_gate_backward(x[5], x[:5], p[:3], 64e-5, trained),
        )


def loss_cases(ops: gpu.CudaKernels, rows: int, vocab: int) -> Iterator[Case]:
    """The loss and its gradient, in bf16."""
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocab, (rows,), device="cuda")
    yield "loss", 4.0 * logits.numel(), lambda: ops.loss(logits, targets, 1e-4, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file, after each")
    c = parser.parse_args()
    torch.cuda.init()
    if reason := load.why_unavailable_on(0):
        raise SystemExit(reason)
    ops, speed = gpu.cuda_kernels(0), copy_speed()
    print(f"copy {speed / 1e9:.2f} TB/s")
    results = []
    for cases, shapes in ((block_cases, SHAPES), (head_cases, SHAPES), (loss_cases, LOSSES)):
        for sizes in shapes:
            shape = ", ".join(map(str, sizes))
            for name, moved, run in cases(ops, *sizes):
                ms = median_ms(run, budget_ms=20)
                results.append({"shape": shape, "operation": name, "ms": ms, "share": moved / speed / ms})
                print(f"{shape:16} {name:32} {ms:8.4f} ms {100 * moved / speed / ms:5.0f} %", flush=True)
                if c.json:
                    c.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
