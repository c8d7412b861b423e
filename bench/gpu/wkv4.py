"""Benchmark the WKV CUDA kernels against a one-thread-per-channel kernel and the PyTorch loop.

    python bench/gpu/wkv4.py [--quick] [--json FILE]

Times are in milliseconds per call: medians of CUDA events around 20 calls, which are launched while
the GPU is still busy with other work. `floor` is the time to read each input and write each output
once at the speed of a large copy on the same GPU: k, v, y forward; k, v, gy, gk, gv backward.
"""

import argparse
import ctypes
import itertools
import json
from pathlib import Path

import torch
from timing import copy_speed, median_ms

from rwkv import compat
from rwkv.kernels import build, load, nvrtc
from rwkv.wkv import wkv4
from rwkv.wkv.wkv4 import native

HERE = Path(__file__).parent


class Naive:
    """The kernels of wkv4_naive.cu, compiled here and launched through the driver API."""

    def __init__(self, dtype: torch.dtype):
        torch.cuda.current_stream()  # makes torch's context current
        major, minor = torch.cuda.get_device_capability()
        compiler = nvrtc.Compiler(compat.nvrtc())
        options = ["--std=c++17"] + (["-DBF16"] if dtype == torch.bfloat16 else [])
        image, _ = compiler.compile(HERE / "wkv4_naive.cu", build.sources(".h"), f"sm_{major}{minor}", options)
        self._cuda = ctypes.CDLL("libcuda.so.1")
        module = ctypes.c_void_p()
        self._check(self._cuda.cuModuleLoadData(ctypes.byref(module), image))
        self._functions = {}
        for name in ("naive_forward", "naive_backward"):
            self._functions[name] = ctypes.c_void_p()
            self._check(self._cuda.cuModuleGetFunction(ctypes.byref(self._functions[name]), module, name.encode()))

    def __call__(self, name: str, shape: tuple[int, int, int], *tensors: torch.Tensor) -> None:
        values = [ctypes.c_longlong(n) for n in shape] + [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        parameters = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values)
        )
        blocks = -(-shape[0] * shape[2] // 32)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            self._cuda.cuLaunchKernel(self._functions[name], blocks, 1, 1, 32, 1, 1, 0, stream, parameters, None)
        )

    @staticmethod
    def _check(result: int) -> None:
        if result:
            raise RuntimeError(f"the CUDA driver returned {result}")


def measure(shape: tuple[int, int, int], dtype: torch.dtype, naive: Naive, speed: float, loop: bool) -> dict:
    batch, length, channels = shape
    torch.manual_seed(0)
    w, u = -torch.exp(torch.randn(channels, device="cuda")), torch.randn(channels, device="cuda")
    k, v, gy = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    kernels = native.cuda_kernels(
        k.device.index, lambda: torch.cuda.current_stream().cuda_stream, native.segment_length(*shape)
    )
    assert load.why_unavailable_on(k.device.index) is None, load.why_unavailable_on(k.device.index)
    y, _, saved = kernels.forward(w, u, k, v, None, None, None)
    gradients = kernels.backward(w, u, k, v, None, None, saved, gy, None)
    result = {"B": batch, "T": length, "C": channels, "dtype": str(dtype).removeprefix("torch.")}
    result["forward"] = median_ms(lambda: kernels.forward(w, u, k, v, None, None, None))
    result["backward"] = median_ms(lambda: kernels.backward(w, u, k, v, None, None, saved, gy, None))
    size = k.numel() * k.element_size()
    result["forward_floor"], result["backward_floor"] = 3 * size / speed, 5 * size / speed

    theirs = (
        torch.empty_like(y),
        torch.empty_like(k),
        torch.empty_like(v),
        *(torch.empty(batch, channels, device="cuda") for _ in range(2)),
    )
    states = torch.empty(batch, length, 3, channels, device="cuda")
    y2, gk2, gv2, gw2, gu2 = theirs
    result["naive_forward"] = median_ms(lambda: naive("naive_forward", shape, w, u, k, v, y2))
    result["naive_backward"] = median_ms(
        lambda: naive("naive_backward", shape, w, u, k, v, gy, states, gw2, gu2, gk2, gv2)
    )
    for ours, other in zip((y, *gradients[2:4]), (y2, gk2, gv2), strict=True):  # the timed kernels compute the same
        torch.testing.assert_close(
            ours, other, rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=2e-2 if dtype == torch.bfloat16 else 1e-3
        )

    if loop:
        leaves = [x.requires_grad_() for x in (w, u, k, v)]
        result["loop"] = median_ms(
            lambda: torch.autograd.grad(wkv4(*leaves, impl="reference")[0], leaves, gy), budget_ms=1
        )
        result["operator"] = median_ms(lambda: torch.autograd.grad(wkv4(*leaves, impl="cuda")[0], leaves, gy))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the corners of the grid")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    batches, lengths, channels = (1, 4, 16), (512, 1024, 4096, 16384), (768, 2048, 5120)
    if arguments.quick:
        batches, lengths, channels = (1, 16), (1024, 16384), (768, 5120)
    speed = copy_speed()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {build.manifest()['device']['compiler']}; copy {speed / 1e9:.2f} TB/s"
    )
    print(
        f"{'B':>3} {'T':>6} {'C':>5} {'dtype':>9} | {'fwd ms':>8} {'× floor':>7} {'naive/ours':>10} | {'bwd ms':>8} {'× floor':>7} {'naive/ours':>10} | loop/operator"
    )
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        naive = Naive(dtype)
        for shape in itertools.product(batches, lengths, channels):
            if shape[0] * shape[1] * shape[2] > 1 << 29:  # the baseline's states would need 6 GiB or more
                continue
            r = measure(shape, dtype, naive, speed, loop=shape[1] <= 1024 and shape[0] == 1)
            results.append(r)
            print(
                f"{r['B']:3} {r['T']:6} {r['C']:5} {r['dtype']:>9} | {r['forward']:8.3f} {r['forward'] / r['forward_floor']:7.2f} {r['naive_forward'] / r['forward']:10.2f}"
                f" | {r['backward']:8.3f} {r['backward'] / r['backward_floor']:7.2f} {r['naive_backward'] / r['backward']:10.2f}"
                + (
                    f" | {r['loop']:.0f} / {r['operator']:.3f} ms = {r['loop'] / r['operator']:.0f}"
                    if "loop" in r
                    else " |"
                ),
                flush=True,
            )
            torch.cuda.empty_cache()
            if arguments.json:
                about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_ms": speed}
                arguments.json.write_text(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    main()
