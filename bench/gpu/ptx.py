"""Test the kernels of the cu117 stack, as PTX, on a GPU that its torch does not support.

    python bench/gpu/ptx.py rwkv/kernels/lib/torch-1.13.1+cu117/rwkv_compute_86.ptx

The driver compiles the PTX. Prints how long it takes, and checks WKV and elementwise operations.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "tests" / "wkv"))
import fused_cases
from cases import assert_close, in_fp64, inputs, outputs_and_gradients

from rwkv.kernels import load
from rwkv.wkv import wkv4
from rwkv.wkv.wkv4 import reference


def run_cuda(w, u, k, v, state=None, reset=None, initial=None):
    return wkv4(w, u, k, v, state, reset, initial=initial, impl="cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ptx", type=Path)
    path = parser.parse_args().ptx
    if reason := load.why_unavailable():
        raise SystemExit(reason)
    torch.zeros(1, device="cuda")
    begin = time.perf_counter()
    torch.ops.rwkv.cuda_load(0, str(path))
    load._devices.add(0)
    print(f"{path.name}: compiled by the driver in {time.perf_counter() - begin:.1f} s", flush=True)
    for shape in ((2, 97, 130), (1, 700, 768)):
        arguments = inputs(*shape, seed=3)
        on_gpu = {id(x): x.cuda() for x in arguments if x is not None}
        moved = [on_gpu.get(id(x)) for x in arguments]  # a tensor passed twice stays one tensor
        ours = outputs_and_gradients(run_cuda, *moved)
        slow = outputs_and_gradients(reference.wkv4, *arguments)
        truth = outputs_and_gradients(reference.wkv4, *in_fp64(arguments))
        assert_close({name: x.cpu() for name, x in ours.items()}, slow, truth, arguments)
    for stream in fused_cases.GPU_STREAMS:
        fused_cases.norm(stream, 19, 768, 1, "cuda")
        fused_cases.gates(stream, 4096, 30, 1, "cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fused_cases.mix(dtype, 127, 768, 3, True, 1, "cuda")
        fused_cases.loss(dtype, 65536, 1, "cuda")
        fused_cases.dropout(dtype, 5000, "cuda")
    print("WKV4 and the elementwise operations are right")


if __name__ == "__main__":
    main()
