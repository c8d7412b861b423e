"""The CPU unit against the reference loop and against its own exponentials, in one run.

    python bench/wkv.py [B T C]

Forward and backward, by the operator (autograd included) and by the unit alone, in a process prepared as training is. The floor is a loop that only takes the same number
of vectorised exponentials, by glibc's vector maths library and on the same threads (bench/exponentials.cpp); the stepwise floor is what the same loop
takes for the exponentials of the recurrence done step by step, torch.exp what torch takes for those. "library fp32" is the unit's own loops with that library's
e^k in place of the inlined polynomial (bench/library_exp.cpp; processors with AVX-512): to be set beside "unit fp32".
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

EXPONENTIALS = 2.5  # per token and channel: one forward, one backward, and four a chunk of 16 tokens each way (cuda/wkv4/wkv4.h, "needs no scale")
STEPWISE = 4  # what the recurrence takes if every step finds its own maximum: of output and update forward, of update again and output backward


def interleaved(
    runs: dict[str, Callable[[], object]], rounds: int = 30, row: int = 5
) -> tuple[dict[str, float], dict[str, float]]:
    """Best milliseconds of each over rounds in which every one runs `row` times: other work on the machine only ever adds, and to all.
    Once over the whole row, and once over its first run alone, which finds the caches as the others left them."""
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
    """Forward and backward by bench/library_exp.cpp, whose numbers are compared with the unit's once."""
    sources = [str(Path(__file__).with_name(name)) for name in ("library_exp.cpp", "library_exp_binding.cpp")]
    loops = cpp_extension.load(
        "library_exp",
        sources,
        extra_cflags=build.HOST_OPTIONS,
        extra_ldflags=["-lmvec"],
        build_directory=folder,
        extra_include_paths=[str(build.SOURCES)],
    )
    unit = native.cpu_kernels()
    y, _, kept = unit.forward(w, u, k, v, None, None, None)
    expected = [y, *unit.backward(w, u, k, v, None, None, kept, gy, None)[:-1]]
    sums = [torch.empty(len(k), *w.shape) for _ in range(2)]  # gw and gu of every row
    found = [torch.empty_like(y), *sums, *(torch.empty_like(x) for x in expected[3:])]

    def run() -> None:
        loops.forward(w, u, k, v, kept, found[0])
        loops.backward(w, u, k, v, kept, gy, *found[1:])

    run()
    torch.testing.assert_close(
        [found[0], *(x.sum(0) for x in sums), *found[3:]], expected, rtol=1e-4, atol=1e-4
    )  # another e^x, and sums over all of time
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
        source, flags = (
            str(Path(__file__).with_name("exponentials.cpp")),
            ["-O3", "-fopenmp", "-ffast-math", "-march=native"],
        )
        floor = cpp_extension.load("exponentials", [source], extra_cflags=flags, build_directory=folder)
        vectors = torch.ops.rwkv.cpu_vectors("") if load.why_unavailable() is None else ""
        library = by_library(folder, w, u, *tensors[torch.float32]) if vectors.startswith("avx512") else None

    def operator(dtype: torch.dtype, impl: str) -> None:
        torch.autograd.grad(wkv4(*leaves[dtype], impl=impl)[0], leaves[dtype], tensors[dtype][2])

    def unit(dtype: torch.dtype) -> None:
        k, v, gy = tensors[dtype]
        forward, backward = native.cpu_kernels()
        _, _, kept = forward(w, u, k, v, None, None, None)
        backward(w, u, k, v, None, None, kept, gy, None)

    runs = {
        "operator fp32": lambda: operator(torch.float32, "cpu"),
        "operator bf16": lambda: operator(torch.bfloat16, "cpu"),
        "unit fp32": lambda: unit(torch.float32),
        "unit bf16": lambda: unit(torch.bfloat16),
        **({"library fp32": library} if library else {}),  # its vectors are those of AVX-512
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
        ms = best[f"unit {name}"]
        print(
            f"unit {name}: {EXPONENTIALS * count / ms / 1e6:.2f} G exponentials/s, {8 * size * count / ms / 1e6:.1f} GB/s of k, v, y and their gradients"
        )
    print(f"loop fp32      {loop['loop']:8.1f} ms  {loop['loop'] / loop['operator']:.0f} × operator fp32")
    print(
        f"bf16 / fp32: operator {best['operator bf16'] / best['operator fp32']:.2f}, unit {best['unit bf16'] / best['unit fp32']:.2f}"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or (1, 1024, 768)))
