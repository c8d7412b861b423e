"""Dropout of adapters inside the token shift, by the CUDA kernels on a CPU (fake_gpu.py): the same
elements and bits as by an operation of its own, and fewer launches.
"""

import adapter_dropout_cases as cases
import pytest
import torch
from fake_gpu import Remote

CASES = {"cases": "adapter_dropout_cases"}


def launches(gpu):
    return [call.split()[1] for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [33, 64])
@pytest.mark.parametrize("drops", [(0.01,), (0, 0.5), (0.4, 0, 0.9), (0.1, 0.1, 0.1)], ids=str)
@pytest.mark.parametrize("reset", [False, True])
def test_mix_drops_the_same_elements(gpu, dtype, channels, drops, reset):
    inside, separate = (gpu.call("fused", "mixed", dtype, 37, channels, drops, reset, way, **CASES) for way in (1, 0))
    assert len(inside) == len(separate)
    for ours, expected in zip(inside, separate, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, expected)
    dropped = [y for y, p in zip(inside, [p for p in drops for _ in range(3 if p else 1)], strict=True) if p]
    assert any((y == 0).any() for y in dropped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "drops"),
    [
        ((2, 37, 64, 5, 8), (0, 0.1, 0.1, 0.1, 0.1)),
        ((2, 37, 33, 5, 4), (0, 0.01, 0, 0.5, 0.9)),
        ((1, 20, 24, 2, 2), (0.4, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("resets", [False, True])
def test_shift_drops_the_same_elements(gpu, monkeypatch, dtype, shape, drops, resets):
    if dtype == torch.float16:  # torch 1.13.1 has no such matmul on CPUs
        monkeypatch.setattr(torch, "bmm", lambda a, b: (a.double() @ b.double()).to(a.dtype))
    found = cases.shifted(Remote(gpu), dtype, shape, drops, resets)
    assert len(found) == sum(p > 0 for p in drops)
    for ours, again, expected in found:
        assert ours.dtype == dtype
        assert torch.equal(ours, expected)
        assert torch.equal(again, expected)
    assert any((ours == 0).any() for ours, *_ in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize(
    ("version", "parts", "saved"),
    [
        ("4", ["att"], 3),
        ("4", ["att.value"], 1),
        ("4", ["att", "ffn", "time", "ln"], 5),
        ("5.2", ["att", "ffn"], 6),
        ("5.2", ["att.gate"], 1),
        ("6", ["att", "ffn"], 6),
        ("6", ["att.value", "att.gate", "time"], 2),
        ("7", ["att", "ffn"], 4),
    ],
)
def test_step_is_the_same(gpu, dtype, grad_cp, version, parts, saved):
    """`saved`: launches of dropout that a block saves in every forward and backward pass."""
    found = {}
    for inside in (True, False):
        gpu.call("calls")
        values = gpu.call("fused", "step", version, parts, dtype, grad_cp, inside, **CASES)
        found[inside] = values, launches(gpu)
    (ours, few), (expected, many) = found[True], found[False]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert len(many) - len(few) == 2 * saved * (3 if grad_cp else 2)  # two blocks; grad_cp repeats the forward pass


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_step_drops_what_a_cpu_drops(gpu, version):
    """With the kernels of a CPU, and for RWKV-6 with torch's operations."""
    arguments = version, ["att", "ffn"], torch.float32, False, True
    ours, theirs = gpu.call("fused", "step", *arguments, **CASES), cases.step(*arguments, kernels=False)
    for a, b in zip(ours, theirs, strict=True):
        # sums in another order; measured 5e-6. Other elements: more than 0.4
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())
