"""Fixtures of the tests of several operators."""

import pytest
import torch


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def vectors(request):
    """Run the CPU kernels with vectors of this width, if the CPU has them."""
    if torch.ops.rwkv.cpu_vectors(request.param) != request.param:
        torch.ops.rwkv.cpu_vectors("")
        pytest.skip("this CPU has no such vectors")
    yield request.param
    torch.ops.rwkv.cpu_vectors("")
