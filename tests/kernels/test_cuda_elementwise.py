"""The elementwise CUDA kernels, executed on a CPU (fake_gpu.py): results and launches."""

import adamw_cases
import fused_cases as cases
import pytest
import torch
from fake_gpu import STREAM
from fused_cases import FP32, GPU_STREAMS, NORM_SIZES, SIZES, normal
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rwkv.kernels import adamw, quant

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31)


@settings(max_examples=25, deadline=None)
@given(stream=st.sampled_from(GPU_STREAMS), rows=st.sampled_from([1, 19]), channels=NORM_SIZES, seed=SEEDS)
@example(stream=GPU_STREAMS[2], rows=1, channels=768, seed=0)
@example(stream=GPU_STREAMS[0], rows=1, channels=8192 + 64, seed=1)  # more than fits a block's registers
@example(stream=GPU_STREAMS[1], rows=1, channels=1024 + 33, seed=2)  # the same, not vectorised
@example(stream=GPU_STREAMS[1], rows=3073, channels=16, seed=3)  # three rows per block, the last has two
@example(stream=GPU_STREAMS[2], rows=2049, channels=17, seed=4)  # two rows per block, not vectorised
def test_norm(gpu, stream, rows, channels, seed):
    gpu.call("fused", "norm", stream, rows, channels, seed)


@settings(max_examples=50, deadline=None)
@given(
    dtype=DTYPES, channels=SIZES, length=st.sampled_from([1, 2, 16, 17, 37]),
    count=st.sampled_from([1, 2, 3]), reset=st.booleans(), seed=SEEDS,
)  # fmt: skip
@example(dtype=FP32, channels=768, length=37, count=3, reset=True, seed=0)
def test_mix(gpu, dtype, channels, length, count, reset, seed):
    gpu.call("fused", "mix", dtype, length, channels, count, reset, seed)


@settings(max_examples=40, deadline=None)
@given(stream=st.sampled_from(GPU_STREAMS), count=SIZES, scale=st.sampled_from([1, 30, 300]), seed=SEEDS)
def test_gates_and_squared_relu(gpu, stream, count, scale, seed):
    gpu.call("fused", "gates", stream, count, scale, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [5003, 5000])
def test_dropout_mask_matches_cpu(gpu, dtype, count):
    gpu.call("fused", "dropout", dtype, count)


@settings(max_examples=25, deadline=None)
@given(dtype=DTYPES, vocab=st.sampled_from([2, 31, 32, 33, 1000, 1001]), seed=SEEDS)
@example(dtype=torch.bfloat16, vocab=20_000, seed=0)  # several elements of a row per thread
def test_loss(gpu, dtype, vocab, seed):
    gpu.call("fused", "loss", dtype, vocab, seed)


def test_nan_and_inf_propagate(gpu):
    gpu.call("fused", "not_finite")


def test_loss_of_minus_infinity(gpu):
    logits, targets = normal((3, 2048), FP32, 0), torch.tensor([5, 1000, 2047])
    logits[:, :5] = logits[1, 8:16] = -float("inf")  # including all eight elements of a thread
    stats = gpu.call("operation", "loss", logits, targets, 0.0, False)
    loss = stats[:, 1].log() + stats[:, 0] - stats[:, 2]
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, targets, reduction="none"), rtol=2e-6, atol=2e-6
    )


def test_loss_of_padded_rows_is_vectorised(gpu):
    for vocab, length, name in ((50_277, 50_304, "bf16"), (50_277, 50_277, "any"), (61, 64, "bf16"), (61, 62, "any")):
        logits = normal((3, length), torch.bfloat16, 0)[:, :vocab]
        gpu.call("calls")
        gpu.call("operation", "loss", logits, torch.tensor([0, 5, vocab - 1]), 0.0, True)
        launches = [call.split()[1] for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
        assert launches == [f"fused_loss_{name}"]


def test_logits_with_overlapping_rows(gpu):
    base = normal((10, 8), torch.bfloat16, 0)
    for logits in (base.as_strided((3, 8), (4, 1)), base.t()):
        with pytest.raises(RuntimeError, match="contiguous rows"):
            gpu.call("operation", "loss", logits, torch.zeros(len(logits), dtype=torch.long), 0.0, False)


def test_target_out_of_range_is_nan(gpu):
    for target in (-1, 64, 1 << 40):
        stats = gpu.call("operation", "loss", normal((2, 64), FP32, 0), torch.tensor([3, target]), 0.0, True)
        assert stats[:, 2].isnan().tolist() == [False, True]


def test_unaligned_input(gpu):
    """Rows whose address is not a multiple of 16 bytes."""
    base = normal((3, 8), torch.bfloat16, 0).flatten()
    k = base[1:17].view(2, 8)  # pickling keeps the storage: 2 bytes after a boundary
    assert torch.equal(gpu.call("operation", "relu2_forward", k), torch.relu(k.float()).square().bfloat16())


def test_deterministic_row_sums(gpu):
    first, second = (gpu.call("fused", "all_gradients") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for ours, cpus in zip(first, cases.all_gradients(), strict=True):
        torch.testing.assert_close(ours, cpus, rtol=1e-5, atol=1e-5)  # different summation order


@pytest.mark.parametrize("affine", [True, False])
def test_launches_per_operation(gpu, affine):
    x, w, stats = normal((2, 50, 64), FP32, 0), torch.ones(64), torch.ones(100, 2)
    gpu.call("calls")
    gpu.call("operation", "norm_backward", x, x, w, stats, affine)
    launches = [call.split()[1:] for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
    rows = [
        "fused_norm_gradient_fp32",
        *"100 1 1 32 1 1 0".split(),
        hex(STREAM),
        "1",
        "1",
    ]  # one warp, 8 threads of it busy
    sums = ["fused_norm_sums_fp32", *"1 1 1 128 1 1 0".split(), hex(STREAM), "1", "1"]
    assert launches == [rows, sums][: 1 + affine]


def test_block_size_follows_row_length(gpu):
    for channels, threads in ((768, 96), (5120, 640), (8192, 1024), (20480, 1024), (33, 64)):
        gpu.call("calls")
        gpu.call(
            "operation",
            "norm_forward",
            torch.ones(1, channels),
            torch.ones(channels),
            torch.zeros(channels),
            1e-5,
            FP32,
        )
        (launch,) = [call.split() for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
        assert launch[5] == str(threads), channels


def test_blocks_of_a_norm_take_up_to_four_rows(gpu):
    for rows, blocks in ((1, 1), (4095, 4095), (4096, 2048), (6146, 2049), (8193, 2049)):
        x, w, stats = torch.ones(rows, 16), torch.ones(16), torch.ones(rows, 2)
        gpu.call("calls")
        gpu.call("operation", "norm_forward", x, w, w, 1e-5, FP32)
        gpu.call("operation", "norm_backward", x, x, w, stats, False)
        launches = [call.split() for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
        assert [launch[2] for launch in launches] == 2 * [str(blocks)], rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_selection_by_dtype_and_width(gpu, dtype):
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    pair = "fp32" if dtype == FP32 else f"fp32_{name}"
    for channels, one, two in ((64, name, pair), (60, "any", "any")):
        gpu.call("calls")
        gpu.call("operation", "relu2_forward", torch.ones(channels, dtype=dtype))
        gpu.call(
            "operation",
            "norm_forward",
            torch.ones(1, channels),
            torch.ones(channels),
            torch.zeros(channels),
            1e-5,
            dtype,
        )
        launches = [call.split()[1] for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
        assert launches == [f"fused_relu2_{one}", f"fused_norm_{two}"]


def test_empty_input_launches_nothing(gpu):
    gpu.call("calls")
    assert gpu.call("operation", "relu2_forward", torch.zeros(0, 8)).shape == (0, 8)
    assert gpu.call("operation", "loss", torch.zeros(0, 8), torch.zeros(0, dtype=torch.long), 0.0, True).shape == (0, 3)
    assert gpu.call("calls") == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("relu2_forward", (torch.zeros(2, 2, dtype=torch.float64),), "take fp32, bf16 or fp16"),
        (
            "relu2_backward",
            (torch.zeros(2, 3), torch.zeros(2, 2)),
            "g must be a contiguous Float tensor of sizes .2, 2.",
        ),
        ("norm_forward", (torch.zeros(2, 3), torch.zeros(2), torch.zeros(3), 1e-5, FP32), "w must be"),
        (
            "norm_forward",
            (torch.zeros(2, 3).bfloat16(), torch.zeros(3), torch.zeros(3), 1e-5, FP32),
            "LayerNorm of bf16 inputs returns bf16, not fp32",
        ),
        (
            "mix_forward",
            (torch.zeros(2, 3), torch.zeros(3), None, None, torch.zeros(1, 3)),
            "x must be contiguous .B, T, D.",
        ),
        ("loss", (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), 0.0, False), "target must be"),
        ("dropout", (torch.zeros(3), torch.tensor(0), 1.0), "p must be at least 0 and less than 1"),
        ("dropout", (torch.zeros(3), torch.zeros((), dtype=torch.int32), 0.1), "seed must be"),
    ],
)
def test_invalid_arguments(gpu, name, arguments, message):
    gpu.call("calls")
    with pytest.raises(RuntimeError, match=message):
        gpu.call("operation", name, *arguments)
    assert gpu.call("calls") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(128, 256), (300, 70), (7, 9), (3, 1024)])  # with and without a rest
def test_dequantisation_matches_reference(gpu, dtype, shape):
    x = normal(shape, FP32, 0)
    nf4, int8 = quant.NF4(x), quant.Int8(x)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    tensors = nf4.packed, quant.nf4_levels(), nf4.absmax, quant.absmax_levels(), nf4.group_absmax, nf4.offset
    gpu.call("calls")
    found = gpu.call("operation", "nf4_dense", *tensors, list(shape), dtype)
    assert torch.equal(found, quant.nf4_reference(*tensors, torch.Size(shape)).to(dtype))
    found = gpu.call("operation", "int8_dense", int8.q, int8.absmax, dtype)
    assert torch.equal(found, quant.int8_reference(int8.q, int8.absmax).to(dtype))
    launches = [call.split() for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
    assert [launch[1] for launch in launches] == [f"quant_nf4_{name}", f"quant_int8_{name}"]
    assert {launch[2] for launch in launches} == {str(-(-x.numel() // 1024))}


def test_dequantisation_checks_sizes(gpu):
    with pytest.raises(RuntimeError, match="absmax must be a contiguous Float tensor of 2 elements"):
        gpu.call("operation", "int8_dense", torch.zeros(2, 8, dtype=torch.int8), torch.zeros(3), FP32)
    nf4 = quant.NF4(torch.ones(4, 64))
    tensors = nf4.packed, quant.nf4_levels(), nf4.absmax, quant.absmax_levels(), nf4.group_absmax, nf4.offset
    with pytest.raises(RuntimeError, match="packed must be a contiguous Byte tensor of 256 elements"):
        gpu.call("operation", "nf4_dense", *tensors, [8, 64], FP32)
    with pytest.raises(RuntimeError, match="return fp32, bf16 or fp16"):
        gpu.call("operation", "int8_dense", torch.zeros(2, 8, dtype=torch.int8), torch.zeros(2), torch.float64)


@pytest.fixture
def adamw_launch(gpu):
    """torch.ops.rwkv.adamw by the CUDA kernels."""

    def launch(*arguments):  # tensors that the other process has changed come back
        changed = gpu.call("changed", "adamw", *arguments)
        for mine, new in zip(arguments, changed, strict=True):
            if torch.is_tensor(mine):
                mine.copy_(new)

    return launch


@pytest.mark.parametrize("dtype", adamw_cases.DTYPES, ids=str)
@pytest.mark.parametrize("size", adamw_cases.SIZES)
def test_adamw_equals_reference(gpu, adamw_launch, dtype, size):
    gpu.call("calls")
    found, expected = (adamw_cases.steps(dtype, size, f, count=3) for f in (adamw_launch, adamw.reference))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    launches = {call.split()[1] for call in gpu.call("calls") if call.startswith("cuLaunchKernel")}
    kind = "8bit" if size >= adamw.MIN_QUANTISED else "full"
    assert launches == {f"adamw_{kind}_{'bf16' if dtype == torch.bfloat16 else 'fp32'}"}
