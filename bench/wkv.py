"""Benchmark the WKV CPU kernels against the reference loop and against their exponentials alone.

    python bench/wkv.py [B T C]

Forward and backward, by the operator (including autograd) and by the kernels alone, in a process
with the CPU settings of training.

- floor: a loop that only computes the same number of exponentials, with glibc's libmvec on the same
  threads (bench/exponentials.cpp)
- stepwise floor: the same for the number of exponentials of the stable recurrence; torch.exp: these
  by torch
- library fp32: our loops with libmvec's e^k in place of the inlined polynomial
  (bench/library_exp.cpp, AVX-512 only); compare with "kernels fp32"
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils import cpp_extension

from rwkv.kernels import build, load
from rwkv.train.runtime import cpu
from rwkv.wkv import wkv4
from rwkv.wkv.wkv4 import native

# Exponentials per token and channel. Unscaled steps: one forward, one backward, and four per chunk
# of 16 tokens in each direction. Stable steps: for output and update, forward and backward.
EXPONENTIALS = 2.5
STEPWISE = 4


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int = 30, row: int = 5
) -> tuple[dict[str, float], dict[str, float]]:
    """Best milliseconds of each over rounds in which every one runs `row` times in a row.

    Returns the best of all runs (warm caches), and the best of the first runs of each row (caches
    as the other contenders left them).
    """
    best, first = (dict.fromkeys(runs, float("inf")) for _ in range(2))
    for _ in range(rounds):
        for name, run in runs.items():
            for i in range(row):
                started = time.perf_counter()
                run()
                took = (time.perf_counter() - started) * 1e3
                best[name] = min(best[name], took)
                if i == 0:
                    first[name] = min(first[name], took)
    return best, first


def by_library(
    folder: str, w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gy: torch.Tensor
) -> Callable[[], None]:
    """Forward and backward by bench/library_exp.cpp; its results are checked against ours once."""
    sources = [str(Path(__file__).with_name(name)) for name in ("library_exp.cpp", "library_exp_binding.cpp")]
    loops = cpp_extension.load(
        "library_exp",
        sources,
        extra_cflags=build.HOST_OPTIONS,
        extra_ldflags=["-lmvec"],
        build_directory=folder,
        extra_include_paths=[str(build.SOURCES)],
    )
    kernels = native.cpu_kernels()
    y, _, saved = kernels.forward(w, u, k, v, None, None, None)
    expected = [y, *kernels.backward(w, u, k, v, None, None, saved, gy, None)[:-1]]
    sums = [torch.empty(len(k), *w.shape) for _ in range(2)]  # gw and gu per row
    found = [torch.empty_like(y), *sums, *(torch.empty_like(x) for x in expected[3:])]

    def run() -> None:
        loops.forward(w, u, k, v, saved, found[0])
        loops.backward(w, u, k, v, saved, gy, *found[1:])

    run()
    torch.testing.assert_close(
        [found[0], *(x.sum(0) for x in sums), *found[3:]], expected, rtol=1e-4, atol=1e-4
    )  # another e^x, and sums over all tokens
    return run


def main(batch: int, length: int, channels: int) -> None:
    cpu.prepare()
    torch.manual_seed(0)
    shape, count = (batch, length, channels), batch * length * channels
    w, u = -torch.exp(torch.randn(channels)), torch.randn(channels)
    tensors = {dtype: [torch.randn(shape).to(dtype) for _ in range(3)] for dtype in (torch.float32, torch.bfloat16)}
    leaves = {dtype: [z.detach().requires_grad_() for z in (w, u, k, v)] for dtype, (k, v, _) in tensors.items()}
    x, y = -torch.rand(count), torch.empty(count)
    with tempfile.TemporaryDirectory() as folder:
        source = str(Path(__file__).with_name("exponentials.cpp"))
        flags = ["-O3", "-fopenmp", "-ffast-math", "-march=native"]
        floor = cpp_extension.load("exponentials", [source], extra_cflags=flags, build_directory=folder)
        vectors = torch.ops.rwkv.cpu_vectors("") if load.why_unavailable() is None else ""
        library = by_library(folder, w, u, *tensors[torch.float32]) if vectors.startswith("avx512") else None

    def operator(dtype: torch.dtype, impl: str) -> None:
        torch.autograd.grad(wkv4(*leaves[dtype], impl=impl)[0], leaves[dtype], tensors[dtype][2])

    def kernels(dtype: torch.dtype) -> None:
        k, v, gy = tensors[dtype]
        forward, backward = native.cpu_kernels()
        _, _, saved = forward(w, u, k, v, None, None, None)
        backward(w, u, k, v, None, None, saved, gy, None)

    runs = {
        "operator fp32": lambda: operator(torch.float32, "cpu"),
        "operator bf16": lambda: operator(torch.bfloat16, "cpu"),
        "kernels fp32": lambda: kernels(torch.float32),
        "kernels bf16": lambda: kernels(torch.bfloat16),
        **({"library fp32": library} if library else {}),  # uses AVX-512
        "floor": lambda: floor.exponentials(x[: count // 2], y, int(2 * EXPONENTIALS)),
        "stepwise floor": lambda: floor.exponentials(x, y, STEPWISE),
        "torch.exp": lambda: [torch.exp(x, out=y) for _ in range(STEPWISE)],
    }
    operator(torch.float32, "cpu")
    best, first = interleaved(runs)
    pair = {"loop": lambda: operator(torch.float32, "reference"), "operator": lambda: operator(torch.float32, "cpu")}
    loop, _ = interleaved(pair, rounds=5, row=1)
    print(f"B{batch} T{length} C{channels}, {torch.get_num_threads()} threads, {vectors}, torch {torch.__version__}")
    for name, ms in best.items():
        print(
            f"{name:14} {ms:8.3f} ms  {ms / best['floor']:6.2f} × floor; with cold caches {first[name] / first['floor']:.2f} ×"
        )
    moved = {"fp32": 4, "bf16": 2}
    for name, size in moved.items():
        ms = best[f"kernels {name}"]
        print(
            f"kernels {name}: {EXPONENTIALS * count / ms / 1e6:.2f} G exponentials/s, {8 * size * count / ms / 1e6:.1f} GB/s of k, v, y and their gradients"
        )
    print(f"loop fp32      {loop['loop']:8.1f} ms  {loop['loop'] / loop['operator']:.0f} × operator fp32")
    print(
        f"bf16 / fp32: operator {best['operator bf16'] / best['operator fp32']:.2f}, kernels {best['kernels bf16'] / best['kernels fp32']:.2f}"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or (1, 1024, 768)))
