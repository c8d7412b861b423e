"""The WKV7 CUDA kernels, executed on a CPU (fake_gpu.py)."""

import pytest
import torch
from fake_gpu import FakeGPU
from fake_gpu import build as build_driver
from wkv7_cases import assert_close, in_fp64, inputs, starts, states

from rwkv.kernels import build

TOKENS, CHUNKS, PARALLEL = ("tokens", "tokens"), ("tokens", "chunks"), ("parallel", "parallel")


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    fake = FakeGPU(build_driver(tmp_path_factory.mktemp("driver")))
    fake.call("load", str(build.library()))
    yield fake
    fake.close()


def check(gpu, methods, tensors, state=None, reset=None, initial=None):
    fast = gpu.call("wkv7_case", "outputs_and_gradients", methods, tensors, state, reset, initial)
    assert_close(fast, in_fp64(tensors, state, reset, initial))


@pytest.mark.parametrize("methods", [TOKENS, CHUNKS, PARALLEL])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 35])
def test_lengths(gpu, length, methods):
    check(gpu, methods, inputs(1, length, 1, 64, seed=length), states(1, 1, 64))


@pytest.mark.parametrize("size", [16, 48, 80, 128, 144, 256])
def test_head_sizes(gpu, size):
    check(gpu, TOKENS, inputs(1, 19, 1, size), states(1, 1, size), starts(1, 19))


@pytest.mark.parametrize(
    ("state", "reset", "initial"),
    [(False, False, False), (False, True, False), (True, True, False), (True, True, True), (False, True, True)],
)
@pytest.mark.parametrize("methods", [TOKENS, CHUNKS, PARALLEL])
def test_states_and_resets(gpu, state, reset, initial, methods):
    check(
        gpu,
        methods,
        inputs(2, 20, 2, 64),
        states(2, 2, 64) if state else None,
        starts(2, 20) if reset else None,
        states(2, 2, 64, 4) if initial else None,
    )


@pytest.mark.parametrize("scale", [0.1, 20.0])
@pytest.mark.parametrize("methods", [TOKENS, CHUNKS, PARALLEL])
def test_decays(gpu, scale, methods):
    check(gpu, methods, inputs(1, 40, 1, 64, scale=scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "methods"), [(64, TOKENS), (64, CHUNKS), (64, PARALLEL), (128, TOKENS)])
def test_half_is_rounded_fp32(gpu, dtype, size, methods):
    gpu.call("wkv7_case", "assert_half_is_rounded_fp32", methods, dtype, inputs(1, 19, 2, size), states(1, 2, size))


@pytest.mark.parametrize("methods", [TOKENS, CHUNKS, PARALLEL])
def test_no_gradient_across_documents(gpu, methods):
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, 7] = True
    gy = torch.ones(1, 20, 1, 64)
    gy[:, 7:] = float("nan")
    initial = torch.zeros(1, 1, 64, 64)
    *gradients, gstate, _ = gpu.call(
        "wkv7_gradients", methods, inputs(1, 20, 1, 64), states(1, 1, 64), initial, reset, gy
    )
    assert all(g[:, :7].isfinite().all() for g in gradients)
    assert gstate.isfinite().all()
    assert gradients[2][:, 7:].isnan().any()


def test_unaligned_inputs(gpu):
    """The kernels read four elements at once; a tensor may start anywhere in its storage."""
    tensors = inputs(1, 9, 1, 64)
    gpu.call("wkv7_unaligned", tensors)


@pytest.mark.parametrize(
    ("size", "methods", "expected"),
    [
        (64, TOKENS, ["wkv7_output_fp32 6 1 1 128 1 1 0", "wkv7_gradient_fp32 6 1 1 128 1 1 0"]),
        (32, TOKENS, ["wkv7_output_fp32 6 1 1 128 1 1 0", "wkv7_gradient_fp32 6 1 1 128 1 1 0"]),
        (80, TOKENS, ["wkv7_output_128 18 1 1 128 1 1 0", "wkv7_gradient_128 18 1 1 128 1 1 0"]),
        (64, CHUNKS, ["wkv7_output_fp32 6 1 1 128 1 1 0", "wkv7_chunk_gradient_fp32 6 1 1 128 1 1 84992"]),
        (
            64,
            PARALLEL,
            [
                "wkv7_prepare_output_fp32 12 1 1 128 1 1 50176",
                "wkv7_scan_output 6 1 1 128 1 1 0",
                "wkv7_parallel_output_fp32 12 1 1 128 1 1 67584",
                "wkv7_prepare_gradient_fp32 12 1 1 128 1 1 50176",
                "wkv7_scan_gradient 6 1 1 128 1 1 0",
                "wkv7_parallel_gradient_fp32 12 1 1 128 1 1 84992",
            ],
        ),
    ],
)
def test_launches(gpu, size, methods, expected):
    """A block per head, or for 32 rows of a large one; or one per head and chunk."""
    gpu.call("calls")
    gpu.call("wkv7_case", "outputs_and_gradients", methods, inputs(2, 17, 3, size))
    calls = [call.split(maxsplit=1)[1] for call in gpu.call("calls") if call.startswith("cuLaunchKernel")]
    assert [call[: len(start)] for call, start in zip(calls, expected, strict=True)] == expected


def test_shared_memory_is_asked_for_once(gpu):
    """A block may only have more than 48 KiB of shared memory if its kernel has this attribute."""
    gpu.call("calls")
    for _ in range(2):
        gpu.call("wkv7_case", "outputs_and_gradients", CHUNKS, inputs(1, 1, 1, 64))
    attributes = [call for call in gpu.call("calls") if call.startswith("cuFuncSetAttribute")]
    assert attributes in ([], ["cuFuncSetAttribute wkv7_chunk_gradient_fp32 8 84992"])  # [] after other tests
