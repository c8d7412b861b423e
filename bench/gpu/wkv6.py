"""Benchmark the WKV6 CUDA kernels, token by token and with segments of the sequence in parallel,
against the bytes they must move, and against the PyTorch loop.

    python bench/gpu/wkv6.py [--quick] [--json FILE]

Times are in milliseconds per call, as in bench/gpu/wkv7.py. `floor` is the time to read each input
and write each output once at the speed of a large copy on the same GPU: r, w, k, v, y forward;
these, gy, and four gradients backward, without the states that the forward pass saves. A decay that
is constant (RWKV-5) is not moved. "token : chunk" is the time of both passes of the kernels token
by token, relative to those of `impl="cuda-chunk"`. A shape that fails is reported, and the others
are still measured.
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
    size, decay = gy.element_size(), 0 if constant else 4
    result = dict(zip(("B", "T", "H"), shape, strict=True), dtype=str(dtype).removeprefix("torch."), constant=constant)
    result["forward_floor"] = gy.numel() * (4 * size + decay) / speed
    result["backward_floor"] = gy.numel() * (7 * size + 2 * decay) / speed
    for kind, kernels in {"": native.kernels_for(gy), "chunk_": native.chunk_kernels_for(gy)}.items():
        saved = kernels.forward(*inputs, None, None, None)[2]
        result[f"{kind}forward"] = median_ms(lambda k=kernels: k.forward(*inputs, None, None, None))
        result[f"{kind}backward"] = median_ms(lambda k=kernels, s=saved: k.backward(*inputs, None, None, s, gy, None))
        del saved
    token, chunk = (result[f"{kind}forward"] + result[f"{kind}backward"] for kind in ("", "chunk_"))
    result["token : chunk"] = token / chunk
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
        f" backward {r['backward']:.3f} ms, {r['backward'] / r['backward_floor']:.1f} × floor;"
        f" by chunks {r['chunk_forward']:.3f} ms, {r['chunk_backward']:.3f} ms, token : chunk {r['token : chunk']:.2f}"
        + (f"; loop {r['reference']:.0f} ms, operator {r['cuda']:.3f} ms" if "cuda" in r else "")
    )


if __name__ == "__main__":
    run(__doc__, cases, measure, line)
