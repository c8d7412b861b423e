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

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from timing import copy_speed, median_ms

from rwkv.kernels import build, load
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


def measure(shape: Shape, dtype: torch.dtype, speed: float, loop: bool) -> dict:
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
        leaves = [x.requires_grad_() for x in inputs]
        for impl in ("reference", "cuda"):
            result[impl] = median_ms(
                lambda impl=impl: torch.autograd.grad(wkv7(*leaves, impl=impl)[0], leaves, gy), budget_ms=1
            )
    return result


def optional(result: dict, name: str, width: int = 8) -> str:
    return f"{result[name]:{width}.3f}" if name in result else " " * width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    shapes = [(batch, length, heads) for batch in (1, 8) for length in (1024, 4096, 16384) for heads in (12, 32, 64)]
    if arguments.quick:
        shapes = [(1, 1024, 12), (1, 4096, 64), (8, 1024, 12), (8, 4096, 32), (8, 4096, 64)]
    speed = copy_speed()
    compiler = build.manifest().get("device", {}).get("compiler")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {compiler}; copy {speed / 1e9:.2f} TB/s")
    print(
        f"{'B':>3} {'T':>5} {'H':>3} {'dtype':>9} | {'fwd ms':>8} {'× floor':>7} |"
        f" {'bwd ms':>8} {'× floor':>7} {'ns/token':>8} |"
        f" {'chunk fwd':>9} {'bwd ms':>8} {'token :':>8} {'fla :':>8} | loop / operator"
    )
    results, failed = [], 0
    for dtype in (torch.bfloat16, torch.float32):
        for shape in shapes if dtype == torch.bfloat16 or not arguments.quick else shapes[1:3]:
            try:
                r = measure(shape, dtype, speed, loop=shape == shapes[0] and dtype == torch.bfloat16)
            except Exception as error:
                print(f"{shape} {dtype}: {type(error).__name__}: {error}", flush=True)
                failed += 1
                continue
            results.append(r)
            print(
                f"{r['B']:3} {r['T']:5} {r['H']:3} {r['dtype']:>9} |"
                f" {r['forward']:8.3f} {r['forward'] / r['forward_floor']:7.2f} |"
                f" {r['backward']:8.3f} {r['backward'] / r['backward_floor']:7.2f} {r['backward'] / r['T'] * 1e6:8.0f} |"
                f" {optional(r, 'chunk_forward', 9)} {optional(r, 'chunk_backward')}"
                f" {optional(r, 'token : chunk')} {optional(r, 'fla : chunk')} |"
                + (f" {r['reference']:.0f} / {r['cuda']:.3f} ms" if "cuda" in r else ""),
                flush=True,
            )
            torch.cuda.empty_cache()
    if arguments.json:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_ms": speed}
        arguments.json.write_text(json.dumps({**about, "results": results}))
    if failed:
        sys.exit(f"{failed} measurements failed")


if __name__ == "__main__":
    main()
