"""Benchmark the WKV7 CUDA kernels, token by token and by chunks, against the bytes they must move,
the PyTorch loop, and flash-linear-attention's chunk_rwkv7 if it is installed.

    python bench/gpu/wkv7.py [--quick] [--json FILE]

Times are in milliseconds per call: medians of CUDA events around 20 calls, which are launched while
the GPU is still busy with other work. `floor` is the time to read each input and write each output
once at the speed of a large copy on the same GPU: r, w, k, v, a, b, y forward; these, gy, and six
gradients backward, without the states that the forward pass saves (N/4 bytes per element, as many
bytes again with bf16). "token : chunk" is the time of the kernels token by token, forward and
backward, relative to that by chunks (`impl="cuda-chunk"`); "fla : chunk" that of chunk_rwkv7 with
autograd. A shape that fails is reported, and the others are still measured.
"""

import math

import torch
from grid import loop_and_operator, run
from timing import median_ms

from rwkv.kernels import load
from rwkv.wkv import wkv7
from rwkv.wkv.wkv7 import native

N = 64  # head size
Shape = tuple[int, int, int]  # B, T, H


def random_inputs(shape: Shape, dtype: torch.dtype) -> list[torch.Tensor]:
    """r, w, k, v, a, b as in the model, and gy."""
    torch.manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(*shape, N, device="cuda", dtype=dtype)

    w = -math.exp(-0.5) * torch.sigmoid(normal().float())
    removal = torch.nn.functional.normalize(normal().float(), dim=-1)
    return [normal(), w, normal(), normal(), (-removal).to(dtype), (removal / 2).to(dtype), normal()]


def fla_operator():
    """flash-linear-attention's operator, or None if it is not installed."""
    try:
        from fla.ops.rwkv7 import chunk_rwkv7
    except ImportError:
        return None
    return chunk_rwkv7


def both_passes(operator, inputs: list[torch.Tensor], gy: torch.Tensor) -> float:
    """Milliseconds of an operator, forward and backward with autograd."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return median_ms(lambda: torch.autograd.grad(operator(*leaves)[0], leaves, gy))


def measure(shape: Shape, dtype: torch.dtype, loop: bool, speed: float) -> dict:
    *inputs, gy = random_inputs(shape, dtype)
    device = gy.device.index
    if reason := load.why_unavailable_on(device):
        raise RuntimeError(reason)
    result = dict(zip(("B", "T", "H"), shape, strict=True), dtype=str(dtype).removeprefix("torch."))
    kinds = {"": native.kernels_for(gy)}
    if torch.cuda.get_device_capability() >= (8, 0):
        kinds["chunk_"] = native.chunk_kernels_for(gy)
    for kind, kernels in kinds.items():
        saved = kernels.forward(*inputs, None, None, None)[2]
        result[f"{kind}forward"] = median_ms(lambda k=kernels: k.forward(*inputs, None, None, None))
        result[f"{kind}backward"] = median_ms(lambda k=kernels, s=saved: k.backward(*inputs, None, None, s, gy, None))
        del saved
    if "chunk_forward" in result:
        result["chunk"] = both_passes(lambda *x: wkv7(*x, impl="cuda-chunk"), inputs, gy)
        result["token : chunk"] = both_passes(lambda *x: wkv7(*x, impl="cuda"), inputs, gy) / result["chunk"]
        if fla := fla_operator():
            result["fla : chunk"] = (
                both_passes(
                    lambda r, w, k, v, a, b: fla(r=r, w=w, k=k, v=v, a=a, b=b, scale=1.0, output_final_state=True),
                    inputs,
                    gy,
                )
                / result["chunk"]
            )
    tensors, size = gy.numel(), gy.element_size()
    result["forward_floor"] = tensors * (6 * size + 4) / speed
    result["backward_floor"] = tensors * (12 * size - size + 8) / speed
    if loop:
        result |= loop_and_operator(wkv7, inputs, gy)
    return result


def optional(result: dict, name: str, width: int = 8) -> str:
    return f"{result[name]:{width}.3f}" if name in result else " " * width


def cases(quick: bool) -> list[tuple]:
    bf16, fp32 = torch.bfloat16, torch.float32
    shapes = [(batch, length, heads) for batch in (1, 8) for length in (1024, 4096, 16384) for heads in (12, 32, 64)]
    if quick:
        shapes = [(1, 1024, 12), (1, 4096, 64), (8, 1024, 12), (8, 4096, 32), (8, 4096, 64)]
    found = [(shape, bf16) for shape in shapes] + [(shape, fp32) for shape in (shapes[1:3] if quick else shapes)]
    return [(*case, i == 0) for i, case in enumerate(found)]


HEADER = (
    f"{'B':>3} {'T':>5} {'H':>3} {'dtype':>9} | {'fwd ms':>8} {'× floor':>7} |"
    f" {'bwd ms':>8} {'× floor':>7} {'ns/token':>8} |"
    f" {'chunk fwd':>9} {'bwd ms':>8} {'token :':>8} {'fla :':>8} | loop / operator"
)


def line(r: dict) -> str:
    return (
        f"{r['B']:3} {r['T']:5} {r['H']:3} {r['dtype']:>9} |"
        f" {r['forward']:8.3f} {r['forward'] / r['forward_floor']:7.2f} |"
        f" {r['backward']:8.3f} {r['backward'] / r['backward_floor']:7.2f} {r['backward'] / r['T'] * 1e6:8.0f} |"
        f" {optional(r, 'chunk_forward', 9)} {optional(r, 'chunk_backward')}"
        f" {optional(r, 'token : chunk')} {optional(r, 'fla : chunk')} |"
        + (f" {r['reference']:.0f} / {r['cuda']:.3f} ms" if "cuda" in r else "")
    )


if __name__ == "__main__":
    run(__doc__, cases, measure, line, HEADER)
