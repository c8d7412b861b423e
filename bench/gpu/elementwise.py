"""Benchmark the elementwise CUDA kernels: time, and speed as a share of a large copy.

    python bench/gpu/elementwise.py [--json FILE]

The share counts the bytes of every input and every output once.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from timing import copy_speed, median_ms

from rwkv.kernels import gpu, load

SHAPES = ((8, 1024, 2048), (8, 1024, 5120), (1, 1024, 2048))  # batch, tokens, channels
LOSSES = ((256, 65536), (2048, 65536), (256, 50277), (2048, 50277))  # rows of a chunk, vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    c = parser.parse_args()
    torch.cuda.init()
    if reason := load.why_unavailable_on(0):
        raise SystemExit(reason)
    ops, speed, bf16 = gpu.cuda_kernels(0), copy_speed(), torch.bfloat16
    results = []
    print(f"copy {speed / 1e9:.2f} TB/s")

    def measure(shape: str, name: str, tensors: float, run: Callable[[], object]) -> None:
        ms = median_ms(run, budget_ms=20)
        results.append({"shape": shape, "operation": name, "ms": ms, "share": tensors / speed / ms})
        print(f"{shape:16} {name:26} {ms:8.4f} ms {100 * tensors / speed / ms:5.0f} %", flush=True)

    for batch, tokens, width in SHAPES:
        shape = f"{batch}, {tokens}, {width}"
        x, g = (torch.randn(batch, tokens, width, device="cuda", dtype=bf16) for _ in range(2))
        k = torch.randn(batch * tokens, 4 * width, device="cuda", dtype=bf16)
        weight, bias = torch.randn(width, device="cuda"), torch.randn(width, device="cuda")
        weights, last = torch.rand(3, width, device="cuda"), torch.zeros(batch, width, device="cuda", dtype=bf16)
        size = 2.0 * x.numel()
        _, stats = ops.norm_forward(x, weight, bias, 1e-5, bf16)
        total = torch.zeros_like(x)
        for name, tensors, run in (
            ("norm", 2, lambda: ops.norm_forward(x, weight, bias, 1e-5, bf16)),
            ("norm backward, frozen", 3, lambda: ops.norm_backward(g, x, weight, stats, False)),
            ("norm backward, trained", 3, lambda: ops.norm_backward(g, x, weight, stats, True)),
            ("mix of 3", 4, lambda: ops.mix_forward(x, last, None, None, weights)),
            ("mix of 3 backward, frozen", 4, lambda: ops.mix_backward([g, g, g], x, last, None, None, weights, False)),
            ("mix of 3 backward, trained", 5, lambda: ops.mix_backward([g, g, g], x, last, None, None, weights, True)),
            ("gate", 3, lambda: ops.gate_forward(x, g)),
            ("gate backward", 5, lambda: ops.gate_backward(g, x, g)),
            ("relu2", 8, lambda: ops.relu2_forward(k)),
            ("relu2 backward", 12, lambda: ops.relu2_backward(k, k)),
            ("dropout", 2, lambda: ops.dropout(x, 7, 0.01)),
            ("dropout, added", 3, lambda: ops.dropout_add(total, x, 7, 0.01)),
        ):
            try:
                measure(shape, name, tensors * size, run)
            except Exception as error:
                print(f"{shape:16} {name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    for rows, vocab in LOSSES:
        logits, targets = torch.randn(rows, vocab, device="cuda", dtype=bf16), torch.randint(vocab, (rows,)).cuda()
        bytes_moved = 4.0 * logits.numel()
        measure(f"{rows}, {vocab}", "loss", bytes_moved, lambda: ops.loss(logits, targets, 1e-4, True))
    if c.json:
        c.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
