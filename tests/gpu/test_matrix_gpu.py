"""common/matrix.h on a GPU: threads have the documented elements, and products are accurate."""

import ctypes
from pathlib import Path

import pytest
import torch

from rwkv import compat
from rwkv.kernels import build, nvrtc

SMALL = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(SMALL, reason="needs compute capability 8.0"),
]


class Args(ctypes.Structure):
    _fields_ = [("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("c", ctypes.c_void_p), ("repeats", ctypes.c_longlong)]


@pytest.fixture(scope="module")
def launch():
    torch.zeros(1, device="cuda")  # makes torch's context current
    major, minor = torch.cuda.get_device_capability()
    source = Path(__file__).with_name("matrix_check.cu")
    compiler = nvrtc.Compiler(compat.nvrtc())
    image, _ = compiler.compile(source, build.sources(".h"), f"sm_{major}{minor}", ["--std=c++17"])
    driver, module = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), image) == 0

    def run(name, blocks, threads, a, b, c, repeats=1):
        function = ctypes.c_void_p()
        assert driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()) == 0
        args = Args(a.data_ptr(), b.data_ptr(), c.data_ptr(), repeats)
        parameters = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(args), ctypes.c_void_p))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        assert driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, None) == 0

    return run


def test_product(launch):
    g = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(*shape, generator=g, device="cuda") for shape in ((16, 64), (64, 8)))
    c = torch.full((16, 8), float("nan"), device="cuda")
    launch("product", 1, 32, a, b, c)
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((c - exact).abs() <= 2.0**-20 * terms).all()  # 2^-21 of each product, and fp32 sums


def test_speed(launch, capsys):
    """Prints the speed. Operands are random, as zeros are multiplied faster."""
    blocks, repeats = 132 * 8, 2000
    a, b = (torch.randn(256, device="cuda") for _ in range(2))
    c = torch.empty(blocks * 128, device="cuda")
    launch("speed", blocks, 128, a, b, c, repeats)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    launch("speed", blocks, 128, a, b, c, repeats)
    end.record()
    torch.cuda.synchronize()
    products = blocks * 4 * repeats * 8  # of 16 x 8 x 8, each three times
    flops = products * 2 * 16 * 8 * 8 / (start.elapsed_time(end) / 1e3)
    with capsys.disabled():
        print(f"\n{flops / 1e12:.1f} TFLOP/s with almost fp32 accuracy (tf32: three times that)")
    assert flops > 1e12
