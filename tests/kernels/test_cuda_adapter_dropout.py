"""Dropout of adapters inside the token shift, by the CUDA kernels on a CPU (fake_gpu.py): the same
elements and bits as by an operation of its own, and fewer launches.
"""

import pytest
import torch

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize(
    ("version", "parts", "saved"),
    [
        ("4", ["att"], 3),
        ("4", ["att.value"], 1),
        ("4", ["att", "ffn", "time", "ln"], 5),
        ("5.2", ["att", "ffn"], 2),
        ("6", ["ffn"], 2),
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
