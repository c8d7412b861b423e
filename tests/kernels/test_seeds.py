"""Seeds of dropout repeat in later passes over a block."""

import pytest
import torch

from rwkv.kernels.elementwise.seeds import Seeds, new_seed


def test_seeds_repeat_in_later_passes():
    seeds, cpu = Seeds(), torch.device("cpu")
    torch.manual_seed(1)
    with seeds:
        first = [int(new_seed(cpu)) for _ in range(3)]
    state = torch.get_rng_state()
    with seeds:
        assert [int(new_seed(cpu)) for _ in range(2)] == first[:2]  # a pass may end early
    with seeds:
        assert [int(new_seed(cpu)) for _ in range(3)] == first
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    assert int(new_seed(cpu)) not in first
    torch.manual_seed(1)
    assert [int(new_seed(cpu)) for _ in range(3)] == first  # those that are drawn without Seeds


def test_seeds_of_an_inner_pass_are_its_own():
    outer, inner, cpu = Seeds(), Seeds(), torch.device("cpu")

    def both():
        with outer:
            first = int(new_seed(cpu))
            with inner:
                between = int(new_seed(cpu))
            return first, between, int(new_seed(cpu))

    torch.manual_seed(2)
    found = both()
    assert len(set(found)) == 3
    assert both() == found


def test_seeds_are_dropped_after_an_error():
    seeds, cpu = Seeds(), torch.device("cpu")
    inside = []

    def failing():
        with seeds:
            inside.append(int(new_seed(cpu)))
            raise ValueError("of the block")

    with pytest.raises(ValueError, match="of the block"):
        failing()
    assert int(new_seed(cpu)) not in inside
