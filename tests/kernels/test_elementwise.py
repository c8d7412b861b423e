"""The fused operations against plain torch formulas: values and gradients for every vector width
(fused_cases.py).
"""

import fused_cases as cases
import pytest
import torch
from fused_cases import NORM_SIZES, SIZES, STREAMS, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv.kernels.elementwise import native

WIDTHS = st.sampled_from(["baseline", "avx2", "avx512", "avx512_bf16", "torch"])  # "torch": no compiled kernels
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def compiled_kernels():
    """Require the compiled kernels; restore the widest vectors after a test."""
    assert native._kernels(torch.zeros(1)) is torch.ops.rwkv
    yield
    set_width("")


def set_width(width):
    native._kernels = COMPILED if width != "torch" else lambda *tensors: None
    torch.ops.rwkv.cpu_vectors("" if width == "torch" else width)


COMPILED = native._kernels


@settings(max_examples=40, deadline=None)
@given(stream=st.sampled_from(STREAMS), width=WIDTHS, channels=NORM_SIZES, seed=st.integers(0, 2**31))
def test_norm(stream, width, channels, seed):
    set_width(width)
    cases.norm(stream, 19, channels, seed)


def test_autocast_output_dtype():
    x, w, b = normal((2, 3, 8), torch.float32, 0), torch.ones(8), torch.zeros(8)
    assert native.norm(x, w, b, 1e-5).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert native.norm(x, w, b, 1e-5).dtype == torch.bfloat16


@settings(max_examples=40, deadline=None)
@given(
    dtype=DTYPES, width=WIDTHS, channels=SIZES, length=st.sampled_from([1, 2, 19]),
    count=st.sampled_from([1, 2, 3]), reset=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_mix(dtype, width, channels, length, count, reset, seed):
    set_width(width)
    cases.mix(dtype, length, channels, count, reset, seed)


@settings(max_examples=30, deadline=None)
@given(
    stream=st.sampled_from(STREAMS),
    width=WIDTHS,
    count=SIZES,
    scale=st.sampled_from([1, 30, 300]),
    seed=st.integers(0, 2**31),
)
def test_gates_and_squared_relu(stream, width, count, scale, seed):
    set_width(width)
    cases.gates(stream, count, scale, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_dropout_independent_of_vector_width(dtype, width):
    set_width(width)
    cases.dropout(dtype, 5003)


def test_dropout_statistics():
    x = torch.ones(1 << 20)
    masks = [native.dropout(x, torch.tensor(seed), 0.25) == 0 for seed in (1, 2, 3)]
    for mask in masks:  # the standard deviation of a share is 0.0004
        assert abs(float(mask.float().mean()) - 0.25) < 0.0025
        assert abs(float((mask[1:] & mask[:-1]).float().mean()) - 0.0625) < 0.0025
    assert abs(float((masks[0] & masks[1]).float().mean()) - 0.0625) < 0.0025
    assert float(native.dropout(x, torch.tensor(9), 0.25).mean()) == pytest.approx(1, abs=0.005)


@settings(max_examples=30, deadline=None)
@given(dtype=DTYPES, width=WIDTHS, vocab=st.sampled_from([2, 31, 32, 33, 1000]), seed=st.integers(0, 2**31))
def test_loss(dtype, width, vocab, seed):
    set_width(width)
    cases.loss(dtype, vocab, seed)


@pytest.mark.parametrize("width", ["baseline", "avx2", "avx512", "avx512_bf16", "torch"])
def test_nan_and_inf_propagate(width):
    set_width(width)
    cases.not_finite()


def test_target_out_of_range():
    with pytest.raises(IndexError, match="target 7 is outside the vocabulary of 7"):
        native.cross_entropy_(torch.zeros(2, 7), torch.tensor([3, 7]), 1e-4, True)


def test_deterministic_across_thread_counts():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(cases.all_gradients())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_model_without_compiled_kernels(make_model, monkeypatch):
    tokens = torch.randint(50, (2, 23), generator=torch.Generator().manual_seed(1))
    found = []
    for kernels in (native._kernels, lambda *tensors: None):
        monkeypatch.setattr(native, "_kernels", kernels)
        model = make_model()
        logits, _ = model(tokens)
        (logits * normal(logits.shape, torch.float32, 3)).sum().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters())])
    for ours, plain in zip(*found, strict=True):  # fp32, different summation order
        assert float((ours - plain).abs().max()) <= 1e-5 * float(plain.abs().max().clamp_min(1))
