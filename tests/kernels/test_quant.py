"""Quantised matrices: equal to bitsandbytes', to their formulas, and as the weight of a layer."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from rwkv import compat
from rwkv.adapters.lora import LoRALinear
from rwkv.kernels import quant
from rwkv.kernels.linear import linear
from rwkv.kernels.quant import FP8, NF4, Int8
from tests.oracle import ask, digest, needs_oracle

KINDS = [NF4, Int8, FP8] if compat.float8() else [NF4, Int8]
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(128, 256), (64, 70), (7, 9), (300, 1024)]  # whole blocks, not whole, odd; more than a group
# of bitsandbytes 0.50.2 on a CPU, printed by PROGRAM: beginnings of the SHA-256 of dense matrices
DIGESTS = {
    "levels": "8501941daa1b8a90",
    "absmax levels": "e732639a65f497b4",
    "nf4 128 x 256 torch.float32": "bfaa3da010834771",
    "nf4 64 x 70 torch.float32": "20d427e820868f72",
    "nf4 7 x 9 torch.float32": "0b27eca92b558e1f",
    "nf4 300 x 1024 torch.float32": "fe7e55daaebe09a2",
    "nf4 128 x 256 torch.bfloat16": "c8ae912c288f3de9",
    "nf4 64 x 70 torch.bfloat16": "b37ea2bcc3aa462e",
    "nf4 7 x 9 torch.bfloat16": "6ca9baf6cc71316c",
    "nf4 300 x 1024 torch.bfloat16": "d27745d376a2e6bb",
    "nf4 128 x 256 torch.float16": "b5b1340c30ac5dce",
    "nf4 64 x 70 torch.float16": "dad50549a14a84e6",
    "nf4 7 x 9 torch.float16": "a6d1ee43f6f95fe3",
    "nf4 300 x 1024 torch.float16": "6520834bb9817845",
    "int8 128 x 256 torch.float16": "29a37b1c7bc62018",
    "int8 64 x 70 torch.float16": "710f9dacaaaf502b",
    "int8 7 x 9 torch.float16": "818edcdb8e80367c",
    "int8 300 x 1024 torch.float16": "117c793f7b157ec1",
}
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import hashlib, json, torch
from bitsandbytes import functional as F
digest = lambda x: hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
found = {"levels": digest(F.get_4bit_type("nf4", "cpu")), "absmax levels": digest(F.create_dynamic_map())}
for name, x in torch.load(sys.argv[2]).items():
    packed, state = F.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
    found[f"nf4 {name}"] = digest(F.dequantize_4bit(packed, state))
    if x.dtype == torch.float16:  # the only one it takes
        q, absmax, _ = F.int8_vectorwise_quant(x)
        found[f"int8 {name}"] = digest(F.int8_vectorwise_dequant(q, absmax))
print(json.dumps(found))
"""


def matrices():
    """Matrices in each dtype, with a row and a block of zeros; the same on every machine."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows, columns in SHAPES:
            # sums of four bytes of a linear congruential generator: nearly normal, and multiples of
            # 1/8192, so that the mean of the absmax does not depend on the order of its sum
            n, state, total = rows * columns, torch.arange(rows * columns) * 2654435761 % (1 << 32), 0
            for _ in range(4):
                state = (state * 1664525 + 1013904223) % (1 << 32)
                total = total + (state >> 24)
            x = ((total - 510).float() / 8192).view(rows, columns)
            x[1 % rows], x.view(-1)[min(64, n - 1) : 128] = 0, 0
            if rows == 7:
                x[1] = 1.0  # int8 of bitsandbytes divides rows of zeros by 0
            found[f"{rows} x {columns} {dtype}"] = x.to(dtype)
    return found


def digests():
    found = {"levels": digest(quant.nf4_levels()), "absmax levels": digest(quant.absmax_levels())}
    for name, x in matrices().items():
        found[f"nf4 {name}"] = digest(NF4(x).dense(x.dtype))
        if x.dtype == torch.float16:
            found[f"int8 {name}"] = digest(Int8(x).dense(torch.float32))
    return found


def test_equals_recorded_bitsandbytes():
    assert digests() == DIGESTS


@pytest.mark.skipif(compat.stack() != "modern", reason="bitsandbytes needs torch 2")
@needs_oracle
def test_equals_bitsandbytes(tmp_path):
    torch.save(matrices(), tmp_path / "in.pt")
    assert digests() == json.loads(ask(PROGRAM, tmp_path / "in.pt").splitlines()[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [NF4, Int8])
def test_kernel_matches_reference(kind, dtype, monkeypatch):
    found = [kind(x) for x in matrices().values()]
    compiled = [matrix.dense(dtype) for matrix in found]
    monkeypatch.setattr(quant, "_kernels", lambda *_: None)
    for matrix, x in zip(found, compiled, strict=True):
        assert x.dtype == dtype
        assert torch.equal(x, matrix.dense(dtype))


def test_quantisation_kernel_matches_reference(monkeypatch):
    """Also at the thresholds themselves, where the lower level is chosen, and with zeros."""
    found = list(matrices().values())
    found.append(torch.cat([quant._thresholds(quant.nf4_levels()), torch.ones(49), torch.zeros(64)]).view(2, 64))
    compiled = [NF4(x) for x in found]
    monkeypatch.setattr(quant, "_kernels", lambda *_: None)
    for matrix, x in zip(compiled, found, strict=True):
        reference = NF4(x)
        assert all(torch.equal(getattr(matrix, name), getattr(reference, name)) for name in NF4._tensors)
    assert (compiled[-1].packed[:7] >> 4).tolist() == [*range(0, 14, 2)]


@pytest.mark.parametrize(("kind", "step"), [(NF4, 0.152), (Int8, 0.5 / 127)])
def test_error_below_half_a_step(kind, step):
    """Half of the widest distance of two levels, relative to the absmax of the block or row. The
    absmax of NF4 is rounded itself, by up to a few percent of the range of all absmax.
    """
    x = matrices()["300 x 1024 torch.float32"]
    error = (kind(x).dense(torch.float32) - x).abs()
    absmax = x.abs().amax(1, keepdim=True) if kind is Int8 else x.view(-1, 64).abs().amax(1, keepdim=True)
    relative = error.view(len(absmax), -1) / absmax.clamp(min=1e-4)
    assert 0 < relative[absmax[:, 0] > 0].max() < step * 1.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flush", [False, True])
def test_zeros(kind, flush):
    """New models have such matrices; training flushes denormals."""
    torch.set_flush_denormal(flush)
    try:
        assert not kind(torch.zeros(64, 128)).dense(torch.float32).any()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_in_parts(kind, monkeypatch):
    x = matrices()["300 x 1024 torch.float32"]
    whole = kind(x)
    monkeypatch.setattr(quant, "_CHUNK", 1 << 12)
    parts = kind(x)
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in kind._tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [NF4, Int8])
@pytest.mark.parametrize("adapted", [False, True])
def test_layer_equals_layer_of_dense_matrix(kind, dtype, adapted):
    """Outputs and gradients; and no dense matrix is saved for the backward pass."""
    generator = torch.Generator().manual_seed(0)
    matrix = kind(torch.randn(96, 64, generator=generator))
    start = torch.randn(2, 5, 64, generator=generator).to(dtype)
    results, saved = [], []
    for weight in (matrix, torch.nn.Parameter(matrix.dense(dtype), requires_grad=False)):
        x, trained = start.clone().requires_grad_(), []
        layer = LoRALinear(weight, 4, 8, 0.1) if adapted else None
        if layer:
            torch.nn.init.ones_(layer.lora_B)
            torch.nn.init.constant_(layer.lora_A, 0.01)
            trained = [layer.lora_A, layer.lora_B]
        torch.manual_seed(1)  # of the dropout
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            y = layer(x) if layer else linear(x, weight)
        y.sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in trained)])
        saved.append(sizes)
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    assert 96 * 64 in saved[1]
    assert 96 * 64 not in saved[0]


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_of_model_keeps_matrix(kind):
    matrix = kind(torch.randn(32, 64))
    before = matrix.dense(torch.float32)
    module = torch.nn.Sequential(matrix).to(torch.bfloat16).half()
    assert torch.equal(matrix.dense(torch.float32), before)
    assert not [*module.parameters(), *module.buffers()]
    assert not module.state_dict()
    assert module.to("meta")[0].device.type == "meta"


fp8_only = pytest.mark.skipif(compat.float8() is None, reason="torch 1 has no float8")


@fp8_only
def test_fp8_is_the_nearest_number_of_e4m3():
    """Against all numbers of the format: sign, 4 bits of exponent (bias 7), 3 of mantissa; no
    infinity (arXiv:2209.05433, table 1).
    """
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    numbers = torch.tensor([*(m / 8 * 2.0**-6 for m in range(8)), *normal], dtype=torch.float64)
    assert float(numbers.max()) == 448
    x = matrices()["300 x 1024 torch.float32"]
    matrix = FP8(x)
    assert float(matrix.scale) == float(x.abs().max() / 448)
    scaled = x.double() / matrix.scale.double()
    distance = (scaled.abs().clamp(max=448)[:8].reshape(-1, 1) - numbers).abs().amin(1)
    found = (matrix.q[:8].double() - scaled[:8]).abs().view(-1)
    # the quotient is rounded to fp32 first
    torch.testing.assert_close(found, distance, rtol=0, atol=448 * 2.0**-24)


@fp8_only
def test_fp8_operands_as_gpus_need_them(monkeypatch):
    """CPUs take any layout. GPUs: the first matrix by rows, the second by columns, sizes that are
    multiples of 16, and for scales by row and column a result in bf16 (checks of torch._scaled_mm).
    """
    calls, product = [], torch._scaled_mm

    def checked(a, b, scale_a, scale_b, out_dtype):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.stride() == (a.shape[1], 1)
        assert b.stride() == (1, b.shape[0])
        assert b.shape[0] % 16 == b.shape[1] % 16 == 0
        assert (scale_a.shape, scale_b.shape) == ((a.shape[0], 1), (1, b.shape[1]))
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert out_dtype == torch.bfloat16
        calls.append(a.shape)
        return product(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    matrix, by_columns = FP8(torch.randn(48, 32)), torch.randn(32, 6).t()
    for x in (torch.randn(2, 3, 32), by_columns, torch.ones(1).expand(6, 32)):
        y = linear(x.clone(memory_format=torch.preserve_format).requires_grad_(), matrix)
        y.sum().backward()  # an expanded gradient
        y = linear(by_columns.clone().requires_grad_(), matrix)
        y.backward(torch.randn(48, 6).t())
    assert len(calls) == 12


@fp8_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_products(dtype):
    """x Wᵀ and g W of the rounded numbers, computed in fp64."""
    generator = torch.Generator().manual_seed(0)
    matrix = FP8(torch.randn(96, 64, generator=generator))
    x = (torch.randn(2, 5, 64, generator=generator) * torch.logspace(-3, 3, 5)[:, None]).to(dtype).requires_grad_()
    g = torch.randn(2, 5, 96, generator=generator).to(dtype)
    y = linear(x, matrix)
    y.backward(g)
    assert y.dtype == x.grad.dtype == dtype

    def rounded(t):
        scale = t.detach().abs().amax(-1, keepdim=True).float() / 448
        return (t.detach() / scale).to(matrix.q.dtype).double() * scale.double()

    dense = matrix.dense(torch.float64)
    for found, one, other in ((y, x, dense.t()), (x.grad, g, dense)):
        sizes = rounded(one).abs() @ other.abs()  # of the sums' terms
        error = (found.double() - rounded(one) @ other).abs()
        # rounded to bf16 (2⁻⁹), to fp16 again (2⁻¹²); sums of up to 96 terms in fp32; underflow in
        # fp16
        assert (error <= 2.0**-8 * (rounded(one) @ other).abs() + 1e-5 * sizes + 1e-7).all()
    # one rounding of inputs to 3 bits of mantissa, one of weights: each up to 2⁻⁴ of a term
    exact = x.detach().double() @ dense.t()
    assert ((y.double() - exact).abs() <= 0.1 * (x.detach().double().abs() @ dense.t().abs())).all()


@fp8_only
def test_fp8_of_sizes_that_gpus_do_not_multiply():
    matrix, x = FP8(torch.randn(20, 24)), torch.randn(3, 24)
    assert torch.equal(linear(x, matrix), x @ matrix.dense(torch.float32).t())


@fp8_only
def test_fp8_keeps_nan_and_zero():
    """A NaN in one row does not reach others, and is not lost: --on_nan sees it."""
    matrix, x = FP8(torch.randn(32, 16)), torch.randn(3, 16)
    x[0, 3], x[1] = math.nan, 0
    y = linear(x, matrix)
    assert y[0].isnan().all()
    assert not y[1].any()
    assert y[2].isfinite().all()


def test_fp8_without_float8(monkeypatch):
    monkeypatch.setattr(compat, "float8", lambda: None)
    with pytest.raises(RuntimeError, match="needs torch 2"):
        FP8(torch.zeros(16, 16))


MEASURE = """
import sys, torch
from pathlib import Path
from rwkv.kernels import quant
from rwkv.train.runtime import cpu

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

cpu.prepare()
large = torch.randn(2048, 1024).bfloat16()
small, before = large[:1024], resident()
made = [quant.KINDS[sys.argv[1]](matrix) for _ in range(15) for matrix in (small, small, small, large, small, large)]
print((resident() - before) / sum(matrix.nbytes for matrix in made))
"""


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantising_leaves_no_holes_in_the_heap(kind, root):
    """Of a process that keeps freed memory, as training does. With parts of 4 MB instead of 256 KB
    int8 took 1.05 to 1.5 times its size, and a model of 0.4b up to 3 times.
    """
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # threads have heaps of their own
    command = [sys.executable, "-c", MEASURE, kind]
    found = subprocess.run(command, cwd=root, env=one_thread, capture_output=True, text=True, check=True)
    assert 0.8 < float(found.stdout) < 1.03  # 0.91 to 0.95 measured: some memory was free before
