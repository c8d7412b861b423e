"""When the CUDA kernels of the time-mix are used; their results: test_cuda_time_mix.py."""

from types import SimpleNamespace

import pytest
import torch

from rwkv.kernels.elementwise import by_head, native


def tensor(dtype=torch.bfloat16, is_cuda=True):
    return SimpleNamespace(dtype=dtype, is_cuda=is_cuda)


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setattr(native, "_kernels", lambda *_: "kernels")
    monkeypatch.delenv("RWKV_FUSED", raising=False)


def test_heads_of_one_dtype_on_a_gpu():
    assert by_head.kernels(64, tensor(), tensor()) == "kernels"
    assert by_head.kernels(80, tensor()) is None
    assert by_head.kernels(64, tensor(), tensor(torch.float32)) is None
    assert by_head.kernels(64, tensor(), tensor(is_cuda=False)) is None


@pytest.mark.parametrize(("value", "found"), [("0", None), ("1", "kernels"), ("", "kernels")])
def test_switched_off(monkeypatch, value, found):
    monkeypatch.setenv("RWKV_FUSED", value)
    assert by_head.kernels(64, tensor()) == found
