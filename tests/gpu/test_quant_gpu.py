"""Quantised matrices on a GPU: dequantised as on a CPU, and multiplied in FP8."""

import pytest
import torch

from rwkv import compat
from rwkv.kernels import quant
from rwkv.kernels.linear import linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(7, 9), (64, 70), (2048, 1024)], ids=str)
def test_dense_equals_cpu(kind, dtype, shape):
    matrix = quant.KINDS[kind](torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    expected = matrix.dense(torch.float32).to(dtype)
    assert torch.equal(matrix.to("cuda").dense(dtype).cpu(), expected)


@pytest.mark.skipif(compat.float8() is None, reason="torch 1 has no float8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 15, 1024])
def test_fp8_product_equals_cpu(dtype, rows):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("GPUs before Ada and Hopper have no FP8 product")
    generator = torch.Generator().manual_seed(0)
    matrix = quant.FP8(torch.randn(768, 256, generator=generator))
    start = torch.randn(rows, 256, generator=generator).to(dtype)
    g = torch.randn(rows, 768, generator=generator).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        x = start.to(device).requires_grad_()
        y = linear(x, matrix.to(device))
        y.backward(g.to(device))
        results.append([y.detach().cpu().float(), x.grad.cpu().float()])
    for ours, expected in zip(*results, strict=True):
        # Both are rounded to bf16 (2⁻⁸ of the element); tensor cores add FP8 products with about 14
        # bits.
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=2**-10 * float(expected.abs().max()))
