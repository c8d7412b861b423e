"""The CUDA kernels of a time-mix around WKV, executed on a CPU (fake_gpu.py): keys and gate of
RWKV-7 (the tests of the time-mix on CPUs), and the gated norm of RWKV-5 and 6.
"""

import pytest
import time_mix_cases as cases
import torch
from fake_gpu import Remote
from launches import Launches

from rwkv.kernels.elementwise import by_head, reference
from rwkv.wkv.wkv7.time_mix import time_mix


@pytest.fixture(autouse=True)
def run(gpu, monkeypatch):
    """Use these kernels for tensors on the CPU, up to their head size."""
    remote = Remote(gpu)
    monkeypatch.setattr(by_head, "kernels", lambda size, *tensors: remote if size <= by_head.MAX_SIZE else None)
    return remote


@pytest.mark.parametrize("first_block", [False, True])
@pytest.mark.parametrize(("H", "N"), [(3, 16), (1, 64), (2, 48)])
def test_compiled_matches_reference(run, first_block, H, N):
    given = *cases.inputs(first_block, T=19, H=H, N=N), cases.resets(T=19)
    truth = cases.outputs_and_gradients(*given, dtype=torch.float64, impl="reference")
    cases.assert_close(cases.outputs_and_gradients(*given), truth)
    assert set(run.calls) == {"keys_forward", "keys_backward", "head_gate_forward", "head_gate_backward"}


@pytest.mark.parametrize("wanted", ["v_first", "r_k", "mix,k_a"])
def test_gradients_of_single_inputs(wanted):
    cases.gradients_of_single_inputs(wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    cases.half_precision(dtype)


def test_zero_key_and_zero_output():
    cases.zero_key_and_zero_output()


def test_decays_near_both_ends():
    cases.decays_near_both_ends()


def test_wide_heads_use_torch(run):
    given = cases.inputs(T=3, H=1, N=80)
    truth = cases.outputs_and_gradients(*given, dtype=torch.float64, impl="reference")
    cases.assert_close(cases.outputs_and_gradients(*given), truth)
    assert not run.calls


def test_refused_kernel_names_the_switch(gpu):
    x, _, p, _ = cases.inputs(first_block=True, T=3)
    inputs, parameters = [x.k, x.v, x.w, x.a], [t.reshape(p.r_k.shape) for t in (p.w0, p.a0, p.k_k, p.k_a)]
    gpu.call("fail", "cuLaunchKernel fused_", 209)
    try:
        with pytest.raises(RuntimeError, match="cuLaunchKernel fused_keys_fp32: .*RWKV_FUSED=0 before the command"):
            gpu.call("operation", "keys_forward", inputs, parameters)
        with pytest.raises(RuntimeError, match="cuLaunchKernel fused_relu2") as other:
            gpu.call("operation", "relu2_forward", x.k)
        assert "RWKV_FUSED" not in str(other.value)
    finally:
        gpu.call("fail", "", 0)
    with pytest.raises(RuntimeError, match="heads have an even size") as wrong:
        gpu.call("operation", "keys_forward", inputs, [t.view(-1, 3) for t in parameters])
    assert "RWKV_FUSED" not in str(wrong.value)


def test_nan_propagates():
    x, v_first, p, state = cases.inputs(T=3)
    x.k[0, 1, 5] = float("nan")
    y = time_mix(x, v_first, p, state, eps=cases.EPS)[0]
    expected = time_mix(x, v_first, p, state, eps=cases.EPS, impl="reference")[0]
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("H", "N"), [(3, 16), (1, 64)])
def test_gated_norm(run, dtype, H, N):
    g = torch.Generator().manual_seed(0)
    shapes = (2, 19, H, N), (2, 19, H * N), (H * N,), (H * N,)
    y, gate, weight, bias = (torch.randn(shape, generator=g) for shape in shapes)
    given = [y.to(dtype), gate.to(dtype), weight, bias]
    given[0][:, 0] = 0  # normalised to zeros
    gout = torch.randn(shapes[1], generator=g).to(dtype)
    results = []
    for function, kind in (
        (lambda *x: by_head.gated_norm(*x, 64e-5), None),
        (lambda *x: reference.gated_norm(64e-5, *x), torch.float64),
    ):
        leaves = [t.to(kind or t.dtype).requires_grad_() for t in given]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, gout.to(out.dtype))])
    for ours, truth in zip(*results, strict=True):
        # fp32 rounding, and that of the result to half precision
        share = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[ours.dtype] + 2e-6
        assert float((ours - truth).abs().max()) <= share * max(1.0, float(truth.abs().max()))
    assert run.calls == ["head_gate_forward", "head_gate_backward"]


def launches(x, v_first, p, state):
    """torch's operations in a forward and backward pass of the time-mix."""
    leaves = [t.requires_grad_() for t in (*x, v_first, *p)]
    with Launches() as found:
        y, _ = time_mix(x, v_first, p, state, eps=cases.EPS)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    return found.names


def test_launches(monkeypatch):
    """In a block of a bf16 model, torch launches a tenth of what it does without these kernels."""

    class Empty:  # kernels that compute nothing
        def keys_forward(self, x, p):
            return [torch.empty_like(x[0], dtype=torch.float32), *map(torch.empty_like, [x[0]] * 4)]

        def keys_backward(self, g, x, p, affine):
            return [*map(torch.empty_like, x), p[0].new_empty(5, *p[0].shape)]

        def head_gate_forward(self, x, p, eps):
            return torch.empty_like(x[1])

        def head_gate_backward(self, g, x, p, eps, affine):
            return [*map(torch.empty_like, x), p[0].new_empty(3, *p[0].shape)]

    given = cases.inputs(T=3, dtype=torch.bfloat16)
    monkeypatch.setattr(by_head, "kernels", lambda *_: None)
    before = launches(*given)
    monkeypatch.setattr(by_head, "kernels", lambda *_: Empty())
    names = launches(*given)
    # copies of eight parameters, ones_like, and the sum of two gradients of r. To these add two
    # kernels and WKV's forward, and three kernels, two sums over tokens and WKV's backward.
    assert len(names) <= 10, names
    assert len(before) > 100
