"""Benchmark the WKV6 CUDA kernels against the bytes they must move, and against the PyTorch loop.

    python bench/gpu/wkv6.py [--quick] [--json FILE]

Times are in milliseconds per call, as in bench/gpu/wkv7.py. `floor` is the time to read each input
and write each output once at the speed of a large copy on the same GPU: r, w, k, v, y forward;
these, gy, and four gradients backward, without the states that the forward pass saves. A decay that
is constant (RWKV-5) is not moved. A shape that fails is reported, and the others are still
measured.
"""

import torch
from grid import loop_and_operator, run
from timing import median_ms

from rwkv.kernels import load
from rwkv.wkv import wkv6
from rwkv.wkv.wkv6 import native

N = 64  # head size
Shape = tuple[int, int, int]  # B, T, H


def measure(shape: Shape, dtype: torch.dtype, constant: bool, loop: bool, speed: float) -> dict:
    torch.manual_seed(0)
    r, k, v, gy = (torch.randn(*shape, N, device="cuda", dtype=dtype) for _ in range(4))
    w = -torch.exp(torch.randn(*(() if constant else shape[:2]), shape[2], N, device="cuda"))
    inputs = [r, w, k, v, torch.randn(shape[2], N, device="cuda")]
    device = gy.device.index
    if reason := load.why_unavailable_on(device):
        raise RuntimeError(reason)
    kernels = native.cuda_kernels(gy, device, lambda: torch.cuda.current_stream().cuda_stream)
    saved = kernels.forward(*inputs, None, None, None)[2]
    size, decay = gy.element_size(), 0 if constant else 4
    result = dict(zip(("B", "T", "H"), shape, strict=True), dtype=str(dtype).removeprefix("torch."), constant=constant)
    result |= {
        "forward": median_ms(lambda: kernels.forward(*inputs, None, None, None)),
        "backward": median_ms(lambda: kernels.backward(*inputs, None, None, saved, gy, None)),
        "forward_floor": gy.numel() * (4 * size + decay) / speed,
        "backward_floor": gy.numel() * (7 * size + 2 * decay) / speed,
    }
    if loop:
        result |= loop_and_operator(wkv6, inputs, gy)
    return result


def cases(quick: bool) -> list[tuple]:
    bf16, fp32 = torch.bfloat16, torch.float32
    shapes = [(batch, length, heads) for batch in (1, 8) for length in (1024, 4096) for heads in (12, 32, 64)]
    found = [(shape, dtype, constant) for dtype in (bf16, fp32) for shape in shapes for constant in (False, True)]
    if quick:
        found = [((1, 1024, 12), bf16, False), ((1, 4096, 64), bf16, False), ((8, 1024, 12), bf16, False),
                 ((8, 4096, 32), bf16, False), ((8, 4096, 32), bf16, True), ((1, 4096, 64), fp32, False)]  # fmt: skip
    return [(*case, i == 0) for i, case in enumerate(found)]


def line(r: dict) -> str:
    return (
        f"B{r['B']} T{r['T']} H{r['H']} {r['dtype']}{' constant decay' if r['constant'] else ''}:"
        f" forward {r['forward']:.3f} ms, {r['forward'] / r['forward_floor']:.1f} × floor;"
        f" backward {r['backward']:.3f} ms, {r['backward'] / r['backward_floor']:.1f} × floor"
        + (f"; loop {r['reference']:.0f} ms, operator {r['cuda']:.3f} ms" if "cuda" in r else "")
    )


if __name__ == "__main__":
    run(__doc__, cases, measure, line)
