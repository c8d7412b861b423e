"""The time-mix of RWKV-7 between its linear layers: compiled, with recomputation, against autograd
in float64.
"""

import pytest
import time_mix_cases as cases
import torch
from time_mix_cases import EPS, assert_close, inputs, outputs_and_gradients, resets

from rwkv.wkv.wkv7 import empty_state
from rwkv.wkv.wkv7.time_mix import Projections, time_mix


@pytest.mark.parametrize("first_block", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_compiled_matches_reference(first_block, reset):
    given = *inputs(first_block), resets() if reset else None
    truth = outputs_and_gradients(*given, dtype=torch.float64, impl="reference")
    assert_close(outputs_and_gradients(*given), truth)


@pytest.mark.parametrize("wanted", ["g", "v_first", "r", "w0", "r_k", "v", "ln_bias", "state", "mix,k_a"])
def test_gradients_of_single_inputs(wanted):
    """Only inputs that require a gradient get one, such as in block 0 of a LoRA run."""
    cases.gradients_of_single_inputs(wanted)


def test_documents_start_with_the_empty_state():
    x, v_first, p, state = inputs()
    reset = torch.zeros(2, 21, dtype=torch.bool)
    reset[:, 8] = True
    y, _ = time_mix(x, v_first, p, state, reset, eps=EPS)
    later = Projections(*(t[:, 8:] for t in x))
    alone, _ = time_mix(later, v_first[:, 8:], p, empty_state(2, 3, 16), eps=EPS)
    torch.testing.assert_close(y[:, 8:], alone, rtol=1e-6, atol=1e-6)  # the same operations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    cases.half_precision(dtype)


def test_zero_key_and_zero_output():
    cases.zero_key_and_zero_output()


def test_decays_near_both_ends():
    cases.decays_near_both_ends()


def test_no_second_derivatives():
    x, v_first, p, state = inputs()
    x.k.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(time_mix(x, v_first, p, state, eps=EPS)[0].sum(), x.k, create_graph=True)
