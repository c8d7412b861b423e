"""AdamW in 8 bits: states equal bitsandbytes', kernels the reference; rounding is unbiased."""

import copy
import json

import adamw_cases
import pytest
import torch

from rwkv import compat
from rwkv.kernels import adamw, quant
from tests.oracle import ask, digest, needs_oracle

# of bitsandbytes 0.50.2, printed by PROGRAM: beginnings of SHA-256
DIGESTS = {
    "levels True": "e732639a65f497b4",
    "codes True": "b94e0058a52d1db7",
    "absmax True": "8d02845616e15d62",
    "dense True": "a1a953e11c53eccf",
    "levels False": "305f002cc11278fb",
    "codes False": "cedc73b225efa321",
    "absmax False": "48f4fb46add10a42",
    "dense False": "633021c1738a8512",
}
# Its implementation in torch: that in C, for CPUs, rounds by a table that has one entry for all
# numbers below 10^-5. A positive second moment is not rounded to 0 (docs/decisions/031).
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import hashlib, json, torch
register, kernels = torch.library.register_kernel, {}
def record(name, device, *rest, **more):
    return lambda function: (kernels.setdefault((name, device), function), register(name, device, *rest, **more)(function))[1]
torch.library.register_kernel = record
from bitsandbytes import functional as F
digest = lambda x: hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
found = {}
for signed, x in torch.load(sys.argv[2]).items():
    levels = F.create_dynamic_map(signed)
    codes, absmax = kernels["bitsandbytes::quantize_blockwise", "default"](x, levels, 256)
    if not signed:
        codes = torch.maximum(codes, (x > 0).to(torch.uint8))
    dense = kernels["bitsandbytes::dequantize_blockwise", "default"](codes, absmax, levels, 256, torch.float32)
    tensors = {"levels": levels, "codes": codes, "absmax": absmax, "dense": dense}
    found |= {f"{name} {signed}": digest(tensor) for name, tensor in tensors.items()}
print(json.dumps(found))
"""


def moments():
    """A first and a second moment by whether they are signed; the same on every machine. Elements
    of a block differ by up to 2^30, one block is 0.
    """
    n = 300 * adamw.BLOCK
    state = torch.arange(n) * 2654435761 % (1 << 32)
    state = (state * 1664525 + 1013904223) % (1 << 32)
    x = ((state >> 16) - (1 << 15)).float() * 2.0 ** -(torch.arange(n) % 31)
    x[512:768] = 0
    return {True: x, False: x.square() * 2.0**-30}


def digests():
    found = {}
    for signed, x in moments().items():
        codes, absmax = adamw.quantise(x, signed)
        dense = adamw.dequantise(codes, absmax, signed)
        tensors = {"levels": quant.dynamic_levels("cpu", signed), "codes": codes, "absmax": absmax, "dense": dense}
        found |= {f"{name} {signed}": digest(tensor) for name, tensor in tensors.items()}
    return found


def test_state_equals_recorded_bitsandbytes():
    assert digests() == DIGESTS


@pytest.mark.skipif(compat.stack() != "modern", reason="bitsandbytes needs torch 2")
@needs_oracle
def test_state_equals_bitsandbytes(tmp_path):
    torch.save(moments(), tmp_path / "in.pt")
    assert digests() == json.loads(ask(PROGRAM, tmp_path / "in.pt").splitlines()[-1])


def test_state_of_second_moment_positive():
    """m / (√v + ε) would be large if v were rounded to 0."""
    v = torch.tensor([1.0, 1e-20, 0.0]).repeat(100)
    assert torch.equal(adamw.dequantise(*adamw.quantise(v, False), False) > 0, v > 0)


def test_small_elements_move_little_after_their_gradient():
    """For example embeddings of tokens that no longer occur. v is 10^-8 of the block's largest."""
    p = torch.zeros(4096)
    state, gradient = adamw.new_state(p), torch.full((4096,), 1e-4)
    gradient[::256] = 1.0
    for factor in (1, 0, 0):
        before = p.clone()
        adamw.step(p, gradient * factor, state, torch.ones(1), 0, 1e-3, (0.9, 0.99), 1e-8, 0.0)
        assert bool(((p - before).abs() <= 1e-3).all())


@pytest.mark.parametrize("dtype", adamw_cases.DTYPES, ids=str)
@pytest.mark.parametrize("size", adamw_cases.SIZES)
def test_kernel_equals_reference(dtype, size):
    compiled, expected = (adamw_cases.steps(dtype, size, f) for f in (torch.ops.rwkv.adamw, adamw.reference))
    assert compiled.keys() == expected.keys()
    assert all(torch.equal(compiled[name], expected[name]) for name in expected)


def test_kernel_independent_of_threads():
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(adamw_cases.steps(torch.bfloat16, 256 * 300 + 5, torch.ops.rwkv.adamw))
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_reference_in_parts(monkeypatch):
    whole = adamw_cases.steps(torch.bfloat16, 5000, adamw.reference)
    monkeypatch.setattr(adamw, "_CHUNK", 1024)
    parts = adamw_cases.steps(torch.bfloat16, 5000, adamw.reference)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_fp32_moments_match_torch():
    """Small tensors: AdamW in fp32, with clipping and weight decay."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(100))
    ours, state, options = p.detach().clone(), adamw.new_state(p), {"betas": (0.9, 0.99), "eps": 1e-8}
    opt = torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1, **options)
    for _ in range(20):
        gradient = torch.randn(100)
        p.grad = gradient * 0.5
        opt.step()
        adamw.step(ours, gradient, state, torch.full((1,), 0.5), 0, 1e-2, (0.9, 0.99), 1e-8, 0.1)
    torch.testing.assert_close(ours, p.detach(), rtol=1e-5, atol=1e-6)  # fp32 rounding


def test_quantised_moments_follow_fp32():
    """The weights after 100 steps, relative to the length of their way: 8-bit moments have errors
    of a few percent each.
    """
    torch.manual_seed(0)
    start = torch.randn(8192)
    rows = []
    for count in (adamw.MIN_QUANTISED, 1 << 20):
        p, generator = start.clone(), torch.Generator().manual_seed(1)
        state = adamw.new_state(p) if count == adamw.MIN_QUANTISED else {
            "step": 0, "moment1": torch.zeros(8192), "moment2": torch.zeros(8192)
        }  # fmt: skip
        for _ in range(100):
            gradient = p + torch.randn(8192, generator=generator)
            adamw.step(p, gradient, state, torch.ones(1), 0, 1e-2, (0.9, 0.99), 1e-8, 0.0)
        rows.append(p)
    assert (rows[0] - rows[1]).norm() < 0.05 * (rows[1] - start).norm()


def test_rounding_unbiased():
    """The mean over keys, whose error falls with their number; 1 + 2^-10 is nearest to 1."""
    x = torch.tensor([1 + 2**-10, -1 - 2**-9, 3.0, 1 + 2**-7, 2.0**-140, 0.0])  # bf16 has 1, 1 + 2^-7, …
    x = x.repeat(2000)
    rounded = torch.stack(
        [adamw.round_stochastically(x, 0, adamw.rounding_key(0, step, "w")).float() for step in range(50)]
    )
    spacing = 2.0**-7
    assert bool(((rounded - x).abs() < spacing).all())
    mean = rounded.view(50 * 2000, 6).mean(0)
    # 100,000 draws: the standard error is at most spacing / 2 / 316
    assert bool(((mean - x[:6]).abs() < 4 * spacing / 2 / 316).all())
    assert torch.equal(mean[2:4], x[2:4])  # numbers of bf16 do not change
    assert {1.0, 1 + spacing} == set(rounded[:, 0].tolist())


def test_rounding_bits_independent():
    """Of steps, tensors, seeds and neighbouring elements: half of the bits are equal."""
    x = torch.full((4096,), 1 + 2.0**-8)  # rounded up or down with probability 1/2
    up = {
        key: adamw.round_stochastically(x, 0, adamw.rounding_key(*key)).float() > 1
        for key in [(0, 1, "a"), (0, 2, "a"), (0, 1, "b"), (1, 1, "a")]
    }
    first = up[0, 1, "a"]
    others = [first.roll(1), first.roll(256), *list(up.values())[1:]]
    for other in others:
        assert abs(float((first == other).float().mean()) - 0.5) < 0.04  # 5 standard errors


def test_rounding_of_special_numbers():
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    rounded = adamw.round_stochastically(x, 0, 7)
    assert torch.equal(rounded[:2].float(), x[:2])
    assert bool(rounded[2].isnan())
    assert torch.equal(rounded[3:].view(torch.int16), x[3:].bfloat16().view(torch.int16))


@pytest.mark.parametrize("name", ["rwkv", "reference"])
def test_nan_clip_changes_nothing(name):
    operation = adamw.reference if name == "reference" else torch.ops.rwkv.adamw
    before = adamw_cases.steps(torch.bfloat16, 5000, operation, count=3)
    after = adamw_cases.steps(torch.bfloat16, 5000, operation, count=4, skipped=3)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_state_size():
    for size in (100, 4096, 5000, 70_001):
        state = adamw.new_state(torch.empty(size, dtype=torch.bfloat16))
        tensors = [x for x in state.values() if torch.is_tensor(x)]
        assert sum(x.numel() * x.element_size() for x in tensors) == adamw.state_bytes(size)
    assert adamw.state_bytes(1 << 20) == (2 + 8 / 256) * 2**20


def test_invalid_arguments():
    p, state = torch.zeros(5000, dtype=torch.bfloat16), adamw.new_state(torch.zeros(5000))

    def run(p=p, **changes):
        new = {**copy.copy(state), **changes}
        adamw.step(p, torch.zeros_like(p), new, torch.ones(1), 0, 0.1, (0.9, 0.99), 1e-8, 0.0)

    run()
    with pytest.raises(RuntimeError, match="the weight must be fp32 or bf16; got Half"):
        run(p.half())
    with pytest.raises(RuntimeError, match="the first moment must be a contiguous Byte tensor of 5000 elements"):
        run(moment1=torch.zeros(5000))
    with pytest.raises(RuntimeError, match="the second moment's absmax must be a contiguous Float tensor of 20"):
        run(absmax2=torch.zeros(19))
    with pytest.raises(RuntimeError, match="steps count from 1; got 0"):
        run(step=-1)
