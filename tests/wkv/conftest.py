"""Fixtures of the tests of several operators."""

import pytest
import torch

from rwkv.kernels import load


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def vectors(request):
    """Run the CPU kernels with vectors of this width, if the CPU has them."""
    assert load.why_unavailable() is None  # loads the kernels
    if torch.ops.rwkv.cpu_vectors(request.param) != request.param:
        torch.ops.rwkv.cpu_vectors("")
        pytest.skip("this CPU has no such vectors")
    yield request.param
    torch.ops.rwkv.cpu_vectors("")
