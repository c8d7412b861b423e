"""The CUDA kernels of RWKV-6's token shift, executed on a CPU (fake_gpu.py): results, and launches
of a time-mix with and without them.
"""

from types import SimpleNamespace

import pytest
import shift_cases as cases
import torch
from fake_gpu import Remote
from launches import Launches

from rwkv.kernels import gpu as cuda
from rwkv.kernels.elementwise import native, shift
from rwkv.kernels.elementwise.recompute import recompute_of
from rwkv.models import v6


@pytest.fixture
def run(gpu):
    return Remote(gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8, 5, 4), (2, 17, 33, 5, 3), (2, 40, 64, 5, 8), (1, 50, 24, 2, 2)])
@pytest.mark.parametrize("resets", [False, True])
def test_matches_fp64(monkeypatch, run, dtype, shape, resets):
    if dtype == torch.float16:  # torch 1.13.1 has no such matmul on CPUs
        monkeypatch.setattr(torch, "bmm", lambda a, b: (a.double() @ b.double()).to(a.dtype))
    cases.check(run, dtype, shape, resets)
    assert run.calls == ["shift_forward", "shift_backward"]


def test_single_gradients(run):
    """A gradient does not depend on which others are required."""
    tensors = cases.inputs(1, 20, 16, 5, 4, torch.float32)
    every = cases.outputs_and_gradients(cases.shifted(run, None), tensors)
    for wanted in ((0,), (0, 3), (7,), (8,)):
        some = cases.outputs_and_gradients(cases.shifted(run, None), tensors, wanted=wanted)
        for i, (ours, all_) in enumerate(zip(some, every, strict=True)):
            assert (ours is None) == (i >= 5 and i - 5 not in wanted)
            assert ours is None or torch.equal(ours, all_)


def test_mixtures_are_recomputed(run):
    tensors = [t.requires_grad_() for t in cases.inputs(2, 20, 16, 5, 4, torch.float32)]
    for y in cases.shifted(run, None)(*tensors):
        recompute = recompute_of(y)
        torch.testing.assert_close(recompute.function(*recompute.inputs), y.detach(), rtol=1e-6, atol=1e-6)


def test_not_finite(run):
    """A NaN spreads to its token and the next one, and not over the start of a document."""
    x, last, *others = cases.inputs(1, 6, 8, 5, 2, torch.float32)
    reset = torch.zeros(1, 6, dtype=torch.bool)
    reset[0, 4] = True
    x[0, 1, 3] = x[0, 3, 5] = float("nan")
    for y in cases.shifted(run, reset)(x, last, *others):
        assert y.isnan().nonzero().tolist() == [[0, 1, 3], [0, 2, 3], [0, 3, 5]]


def test_when_the_kernels_are_used(monkeypatch):
    monkeypatch.setattr(native, "_kernels", lambda *_: "kernels")
    x = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True)
    monkeypatch.delenv("RWKV_FUSED", raising=False)
    assert shift.kernels(x) == "kernels"
    assert shift.kernels(torch.zeros(1)) is None
    monkeypatch.setenv("RWKV_FUSED", "0")
    assert shift.kernels(x) is None


@pytest.fixture
def time_mix():
    """A time-mix of RWKV-6 with random weights, and its inputs."""
    torch.manual_seed(0)
    mix = v6.TimeMix(v6.Sizes(1, 64, 16, head_size=16, rank_mix=8, rank_w=8))
    for p in mix.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, last = torch.randn(2, 19, 64), torch.randn(2, 64)
    return mix, x.requires_grad_(), last, torch.zeros(2, 4, 16, 16), torch.rand(2, 19) < 0.2


def test_time_mix_with_and_without(time_mix, run, monkeypatch):
    mix, x, *others = time_mix
    results = []
    for kernels in (None, run):
        monkeypatch.setattr(shift, "kernels", lambda *_, kernels=kernels: kernels)
        y, _ = mix(x, *others)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *mix.parameters()])])
    for plain, fused in zip(*results, strict=True):
        assert float((plain - fused).abs().max()) <= 2e-5 * max(1.0, float(plain.abs().max()))  # sums in fp32
    assert run.calls.count("shift_backward") == 1


class Empty:
    """Kernels that compute nothing."""

    def shift_forward(self, x, last, reset, mix, parts, seeds, p, want_y):
        return [torch.empty_like(x) for _ in mix]

    def shift_backward(self, gy, x, last, reset, mix, parts, want_mix):
        return torch.empty_like(x), torch.empty_like(last), torch.empty_like(parts), torch.empty_like(mix)


def test_launches(time_mix, monkeypatch):
    """From the token shift to the linear layers of a bf16 model, forward and backward with trained
    weights: a third of torch's launches.
    """
    mix, x, last, *_ = time_mix
    found = {}
    for name, kernels in (("torch", None), ("fused", Empty())):
        monkeypatch.setattr(shift, "kernels", lambda *_, kernels=kernels: kernels)
        x = x.detach().bfloat16().requires_grad_()
        with Launches() as counted:
            outputs = list(mix._mixtures(x, last.bfloat16(), None))
            wanted = [x, *(p for n, p in mix.named_parameters() if n.startswith("time_maa"))]
            torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])
        found[name] = [n for n in counted.names if n != "ones_like"]
    print({name: len(names) for name, names in found.items()}, found["fused"])
    assert 3 * (len(found["fused"]) + 3) <= len(found["torch"])  # two kernels, and the sum over slices


def test_operations_are_bound():
    assert {"shift_forward", "shift_backward"} <= set(cuda.TIME_MIX)
