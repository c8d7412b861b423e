"""What is particular to the WKV7 CUDA kernels on a GPU, token by token and by chunks (see also
test_heads_gpu.py): decays, documents, the time-mix, memory.
"""

import pytest
import torch
from head_cases import WKV7, assert_close, inputs7, outputs_and_gradients, starts, states

from rwkv.kernels import load
from rwkv.wkv import wkv7
from rwkv.wkv.wkv7 import native, reference
from rwkv.wkv.wkv7.time_mix import Parameters, Projections, time_mix
from tests.gpu.on_gpu import has_tensor_cores, on_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def token_by_token(*tensors, state=None, reset=None, initial=None):
    return wkv7(*tensors, state, reset, initial=initial, impl="cuda")


def by_chunks(*tensors, state=None, reset=None, initial=None):
    return wkv7(*tensors, state, reset, initial=initial, impl="cuda-chunk")


@pytest.fixture(
    params=[
        token_by_token,
        pytest.param(by_chunks, marks=pytest.mark.skipif(not has_tensor_cores(), reason="needs tensor cores for TF32")),
    ]
)
def cuda(request):
    """The operator by one kind of kernels."""
    return request.param


def kernels(cuda, tensors):
    assert load.why_unavailable_on(0) is None
    return (native.kernels_for if cuda is token_by_token else native.chunk_kernels_for)(tensors[0])


def check(cuda, tensors, state=None, reset=None, initial=None):
    arguments = on_gpu(tensors, state, reset, initial)
    assert_close(outputs_and_gradients(cuda, *arguments), WKV7.in_fp64(*arguments))


@pytest.mark.parametrize("size", [16, 48, 80, 128, 144, 256])
def test_head_sizes(size):
    check(token_by_token, inputs7(2, 35, 2, size), states(2, 2, size), starts(2, 35))


@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_decays(cuda, scale):
    check(cuda, inputs7(1, 600, 2, 64, scale=scale))


def test_no_gradient_across_documents():
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 21] = True
    tensors, first, reset = on_gpu(inputs7(1, 40, 2, 64), states(1, 2, 64), reset)
    leaves = [x.requires_grad_() for x in (*tensors, first)]
    y, _ = token_by_token(*leaves[:6], state=leaves[6], reset=reset, initial=torch.zeros_like(first))
    gy = torch.ones_like(y)
    gy[:, 21:] = float("nan")
    *gradients, gstate = torch.autograd.grad(y, leaves, gy)
    assert all(g[:, :21].isfinite().all() for g in gradients)
    assert gstate.isfinite().all()
    assert gradients[2][:, 21:].isnan().any()


@pytest.mark.skipif(not has_tensor_cores(), reason="needs tensor cores for TF32")
def test_no_gradient_across_documents_of_a_chunk():
    """What a later document gets does not change the earlier one's gradients."""
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, 7] = True
    tensors, first, reset = on_gpu(inputs7(1, 20, 2, 64), states(1, 2, 64), reset)
    results = []
    for later in (1.0, 1e30):
        leaves = [x.clone().requires_grad_() for x in (*tensors, first)]
        y, _ = by_chunks(*leaves[:6], state=leaves[6], reset=reset, initial=torch.zeros_like(first))
        gy = torch.ones_like(y)
        gy[:, 7:] = later
        results.append(torch.autograd.grad(y, leaves, gy))
    for small, large in zip(*(found[:6] for found in results), strict=True):
        assert torch.equal(small[:, :7], large[:, :7])
    assert torch.equal(results[0][6], results[1][6])


@pytest.mark.skipif(not has_tensor_cores(), reason="needs tensor cores for TF32")
def test_long_memory_by_chunks():
    """A state that lasts for many chunks does not gather the rounding of the tensor cores."""
    tensors = inputs7(1, 2000, 2, 64)
    tensors[1] *= 1e-3
    check(by_chunks, tensors, states(1, 2, 64))


@pytest.mark.skipif(not has_tensor_cores(), reason="needs tensor cores for TF32")
def test_strongest_decay_by_chunks():
    tensors, first = on_gpu(inputs7(1, 40, 2, 64), states(1, 2, 64))
    tensors[1][:] = -4
    # gw is e^w of the terms, like r · gr, whose differences it is computed from
    assert_close(outputs_and_gradients(by_chunks, tensors, first), WKV7.in_fp64(tensors, first), share=4e-5)


def test_nan_propagates():
    for i in range(6):
        tensors = inputs7(1, 20, 1, 64)
        tensors[i][0, 3, 0, 2] = float("nan")
        expected = reference.wkv7(*tensors)[0].isnan()
        assert torch.equal(token_by_token(*on_gpu(tensors)[0])[0].isnan().cpu(), expected), i
        if has_tensor_cores():
            found = by_chunks(*on_gpu(tensors)[0])[0].isnan().cpu()
            assert found[expected].all(), i  # it spreads over its chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_time_mix(cuda, dtype):
    """The gradients of everything between the linear layers, against float64."""
    g = torch.Generator().manual_seed(0)
    heads, channels = 3, 3 * 64

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g).to("cuda", dtype)

    x = Projections(*(normal(2, 40, channels, dtype=dtype) for _ in range(7)))
    p = Parameters(normal(channels), normal(channels), normal(heads, 64), *(normal(1, 1, channels) for _ in range(5)))
    v_first, state = normal(2, 40, channels, dtype=dtype), normal(2, heads, 64, 64)
    reset = starts(2, 40).cuda()
    gy, glast = normal(2, 40, channels), normal(2, heads, 64, 64)
    results = []
    for impl, kind in (("cuda" if cuda is token_by_token else "cuda-chunk", None), ("reference", torch.float64)):
        leaves = [t.to(kind or t.dtype).detach().requires_grad_() for t in (v_first, state, *x, *p)]
        y, last = time_mix(Projections(*leaves[2:9]), leaves[0], Parameters(*leaves[9:]), leaves[1], reset,
                           eps=64e-5, impl=impl)  # fmt: skip
        results.append([y, last, *torch.autograd.grad((gy * y).sum() + (glast * last).sum(), leaves)])
    for ours, truth in zip(*results, strict=True):
        # fp32 rounding; in half precision, the inputs and the output of WKV are rounded
        allowed = (1e-5 if dtype == torch.float32 else 0.03) * max(1.0, float(truth.abs().max()))
        assert float((ours - truth).abs().max()) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documented_memory(cuda, dtype):
    r, w, *others = on_gpu(inputs7(2, 4096, 16, 64))[0]
    leaves = [x.requires_grad_() for x in (r.to(dtype), w, *(x.to(dtype) for x in others))]
    gy = torch.randn_like(leaves[0])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, last = cuda(*leaves)
    elements = y.numel()
    # cuda/README.md: y, the last state, and N/4 bytes per element for the saved states
    saved = torch.cuda.memory_allocated() - before
    assert saved <= elements * (y.element_size() + 64 / 4) + 4 * last.numel() + (1 << 20)
    torch.autograd.grad(y, leaves, gy)
    peak = torch.cuda.max_memory_allocated() - before
    # plus six gradients, and a few states per head
    allowed = elements * (6 * y.element_size() + 4 + 64 / 4) + 8 * 4 * last.numel() + (1 << 20)
    if cuda is by_chunks:  # and the workspace
        allowed += 43_000 * 8192
    assert peak <= allowed


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 48 << 30,
    reason="needs 48 GiB of GPU memory",
)
def test_64_bit_offsets(cuda):
    """The saved states of the last row start 2^31 elements after the first."""
    batch, length, heads = 2, 70_000, 64
    g = torch.Generator("cuda").manual_seed(0)

    def normal():
        return torch.randn(batch, length, heads, 64, generator=g, device="cuda", dtype=torch.bfloat16)

    removal = torch.nn.functional.normalize(normal(), dim=-1)
    leaves = [normal(), -0.6 * torch.rand_like(removal, dtype=torch.float32), normal(), normal(), -removal, removal / 2]
    gy = normal()
    ours, theirs = [], []
    for found, rows in ((ours, slice(0, 2)), (theirs, slice(1, 2))):
        y, last, saved = kernels(cuda, leaves).forward(*(x[rows] for x in leaves), None, None, None)
        found += [y, last]
        found += kernels(cuda, leaves).backward(*(x[rows] for x in leaves), None, None, saved, gy[rows], None)[:7]
        del saved
    assert saved_elements(batch, length, heads) > 1 << 31
    assert all(torch.equal(whole[1:], row) for whole, row in zip(ours, theirs, strict=True))


def saved_elements(batch, length, heads):
    return batch * heads * -(-length // 16) * 64 * 64
