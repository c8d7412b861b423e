"""The WKV7 CUDA kernels, executed on a CPU (fake_gpu.py)."""

import pytest
import torch
from fake_gpu import FakeGPU
from fake_gpu import build as build_driver
from wkv7_cases import assert_close, in_fp64, inputs, outputs_and_gradients, starts, states

from rwkv.kernels import build
from rwkv.wkv import wkv7


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    fake = FakeGPU(build_driver(tmp_path_factory.mktemp("driver")))
    fake.call("load", str(build.library()))
    yield fake
    fake.close()


def check(gpu, narrow, tensors, state=None, reset=None, initial=None):
    fast = gpu.call("wkv7_case", "outputs_and_gradients", narrow, tensors, state, reset, initial)
    assert_close(fast, in_fp64(tensors, state, reset, initial))


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 35])
def test_lengths(gpu, length, narrow):
    check(gpu, narrow, inputs(1, length, 1, 64, seed=length), states(1, 1, 64))


@pytest.mark.parametrize("size", [16, 48, 80, 128, 144, 256])
def test_head_sizes(gpu, size):
    check(gpu, size % 32 == 0, inputs(1, 19, 1, size), states(1, 1, size), starts(1, 19))


@pytest.mark.parametrize(
    ("state", "reset", "initial"),
    [(False, False, False), (False, True, False), (True, True, False), (True, True, True), (False, True, True)],
)
def test_states_and_resets(gpu, state, reset, initial):
    check(
        gpu,
        state,
        inputs(2, 20, 2, 64),
        states(2, 2, 64) if state else None,
        starts(2, 20) if reset else None,
        states(2, 2, 64, 4) if initial else None,
    )


@pytest.mark.parametrize("scale", [0.1, 20.0])
def test_decays(gpu, scale):
    check(gpu, False, inputs(1, 40, 1, 64, scale=scale))
