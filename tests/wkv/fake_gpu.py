"""Runs the CUDA kernels on a CPU in a separate process: the real launcher with a fake driver
(fake_driver.cpp).

    python fake_gpu.py LIBRARY     then pickled requests on stdin, pickled answers on stdout

The separate process keeps the fake driver apart from a real one.
"""

import ctypes
import functools
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

from tests.waiting import LIMIT

ROOT = Path(__file__).parents[2]
STREAM, DEVICE = 0x5EED, 3


def build(folder: Path) -> Path:
    """Compile the fake driver."""
    library = folder / "libcuda.so.1"
    command = [
        "g++",
        "-O1",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-maybe-uninitialized",
        "-fno-strict-aliasing",
        "-U_FORTIFY_SOURCE",  # its longjmp refuses to change stacks
    ]
    source = Path(__file__).with_name("fake_driver.cpp")
    subprocess.run([*command, f"-I{ROOT / 'cuda'}", "-Wl,-soname,libcuda.so.1", source, "-o", library], check=True)
    return library


class FakeGPU:
    """The client: `call(name, ...)` runs a method of `Server` in the other process and raises its
    errors.
    """

    def __init__(self, library: Path):
        here = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
        }  # this checkout, wherever rwkv is installed
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(library)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=here
        )

    def call(self, name: str, *arguments, **named):
        pickle.dump((name, arguments, named), self._process.stdin)
        self._process.stdin.flush()
        answer = pickle.load(self._process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=LIMIT)


class Remote:
    """The operations of rwkv.kernels.gpu in the other process; `calls` are their names."""

    def __init__(self, gpu: FakeGPU):
        self.gpu, self.calls = gpu, []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            return self.gpu.call("operation", name, *arguments)

        return call


class Server:
    """The methods of the other process."""

    def __init__(self, library: str):
        self.driver = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # found by the launcher's dlopen("libcuda.so.1")
        self.driver.fake_calls.restype = ctypes.c_char_p
        from rwkv.kernels import load
        from rwkv.wkv.wkv4 import native  # after the fake driver is loaded

        assert load.why_unavailable() is None, load.why_unavailable()
        self.native = native

    def load(self, path):
        import torch

        torch.ops.rwkv.cuda_load(DEVICE, path)

    def wkv4(self, segment, w, u, k, v, state, reset, initial):
        kernels = self.native.cuda_kernels(DEVICE, lambda: STREAM, segment)
        return self.native.run(kernels, w, u, k, v, state, reset, initial)

    def bytes(self, segment, w, u, k, v, state, reset, initial):
        """As wkv4, with `reset` as raw bytes: pickling bool tensors normalises them to 0 and 1."""
        import torch

        return self.wkv4(segment, w, u, k, v, state, reset.view(torch.bool), initial)

    def outputs_and_gradients(self, segment, *inputs):
        from cases import outputs_and_gradients

        return outputs_and_gradients(lambda *x: self.wkv4(segment, *x), *inputs)

    def half(self, segment, dtype, *inputs):
        from cases import assert_half_is_rounded_fp32

        assert_half_is_rounded_fp32(lambda *x: self.wkv4(segment, *x), dtype, inputs)

    def gradients(self, segment, gy, gstate, w, u, k, v, state, reset, initial):
        """Gradients of w, u, k, v, state and initial for output gradients gy and gstate (None: no
        gradient).
        """
        kernels = self.native.cuda_kernels(DEVICE, lambda: STREAM, segment)
        _, _, saved = kernels.forward(w, u, k, v, state, initial, reset)
        return kernels.backward(w, u, k, v, initial, reset, saved, gy, gstate)

    def wkv6_forward(self, *tensors, segment=0):
        """The forward pass of wkv6.native.cuda_kernels."""
        from rwkv.wkv.wkv6 import native

        return native.cuda_kernels(tensors[0], DEVICE, lambda: STREAM, segment).forward(*tensors)

    def wkv6_backward(self, *tensors, segment=0):
        """The backward pass of wkv6.native.cuda_kernels."""
        from rwkv.wkv.wkv6 import native

        return native.cuda_kernels(tensors[0], DEVICE, lambda: STREAM, segment).backward(*tensors)

    def wkv7_kernels(self, r, chunks):
        """The kernels by chunks with so many per launch; those token by token for 0."""
        from rwkv.wkv.wkv7 import native

        if chunks:
            return native.cuda_chunk_kernels(DEVICE, lambda: STREAM, chunks)
        return native.cuda_kernels(r, DEVICE, lambda: STREAM)

    def wkv7(self, *tensors, state=None, reset=None, initial=None, chunks=0):
        from rwkv.wkv.wkv7 import native

        kernels = self.wkv7_kernels(tensors[0], chunks)
        return native.run(kernels, *tensors, state, reset, state if initial is None else initial)

    def wkv7_case(self, name, *arguments, chunks=0):
        """Run a function of head_cases.py with the CUDA kernels; returns its result."""
        import head_cases

        return getattr(head_cases, name)(functools.partial(self.wkv7, chunks=chunks), *arguments)

    def wkv7_gradients(self, tensors, state, initial, reset, gy, chunks=0):
        """Gradients of r, w, k, v, a, b, state and initial for the output gradient gy."""
        kernels = self.wkv7_kernels(tensors[0], chunks)
        _, _, saved = kernels.forward(*tensors, state, initial, reset)
        return kernels.backward(*tensors, initial, reset, saved, gy, None)

    def wkv7_saved(self, tensors, state, reset, chunks=0):
        """The states that the forward pass saves."""
        return self.wkv7_kernels(tensors[0], chunks).forward(*tensors, state, state, reset)[2]

    def wkv7_unaligned(self, tensors, chunks=0):
        """Check that tensors one element further in memory give the same result."""
        import torch

        shifted = [torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for x in tensors]
        assert all(x.data_ptr() % 16 for x in shifted)
        assert torch.equal(self.wkv7(*shifted, chunks=chunks)[0], self.wkv7(*tensors, chunks=chunks)[0])

    def fused(self, name, *arguments, cases="fused_cases"):
        """Run a check of fused_cases.py, or another file, with the CUDA kernels; returns its
        result.
        """
        from rwkv.kernels import gpu
        from rwkv.kernels.elementwise import native as fused

        kernels = gpu.CudaKernels(DEVICE, lambda: STREAM)
        fused._kernels = lambda *tensors: None if any(t.dtype not in fused._DTYPES for t in tensors) else kernels
        return getattr(importlib.import_module(cases), name)(*arguments)

    def operation(self, name, *arguments):
        """Run an operation of rwkv.kernels.gpu."""
        from rwkv.kernels import gpu

        return getattr(gpu.CudaKernels(DEVICE, lambda: STREAM), name)(*arguments)

    def changed(self, name, *arguments):
        """Run an operation that changes its arguments; returns them."""
        self.operation(name, *arguments)
        return arguments

    def calls(self):
        return self.driver.fake_calls().decode().splitlines()

    def fail(self, which, result):
        self.driver.fake_failure(which.encode(), result)


def main() -> None:
    server, answers = Server(sys.argv[1]), sys.stdout.buffer
    sys.stdout = sys.stderr
    while True:
        try:
            name, arguments, named = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = getattr(server, name)(*arguments, **named)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
