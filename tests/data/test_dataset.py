"""Contexts are slices of the stream; no two samples of a run share a number; what is too short is refused."""

import numpy as np
import pytest

from rwkv.data.dataset import Contexts
from rwkv.data.sampling import prime_offset
from rwkv.errors import UserError

STREAM = np.arange(1000, dtype=np.uint16)


def test_y_is_x_one_token_later():
    data = Contexts(STREAM, 7, 20, seed=3)
    for index in range(20):
        x, y = data[index]
        assert x.tolist() == list(range(x[0], x[0] + 7))
        assert y.tolist() == [i + 1 for i in x.tolist()]


def test_prime_order_is_upstreams_across_epochs_and_ranks():
    # upstream: ii = 1 + epoch · samples_per_epoch + idx · world + rank, samples_per_epoch over all ranks
    samples, world = 6, 3
    for epoch in range(3):
        for rank in range(world):
            data = Contexts(STREAM, 10, samples, prime=89, rank=rank, world_size=world, epoch=epoch)
            expected = [prime_offset(1 + epoch * samples * world + i * world + rank, 89, 10) for i in range(samples)]
            assert [data.offset(i) for i in range(samples)] == expected


@pytest.mark.parametrize("prime", [0, 89])
def test_ranks_share_out_what_one_process_would_see(prime):
    alone = Contexts(STREAM, 10, 12, seed=5, prime=prime)
    shared = [Contexts(STREAM, 10, 6, seed=5, prime=prime, rank=rank, world_size=2) for rank in (0, 1)]
    for epoch in (0, 1):
        for data in (alone, *shared):
            data.epoch = epoch
        assert [alone.offset(i) for i in range(12)] == [shared[i % 2].offset(i // 2) for i in range(12)]


def test_data_shorter_than_a_context_is_refused_with_numbers():
    with pytest.raises(UserError, match=r"holds 9 tokens, and one context of ctx_len 8 needs 10; give more text, or --ctx_len 7 or less"):
        Contexts(STREAM[:9], 8, 1)
    Contexts(STREAM[:10], 8, 1)


@pytest.mark.parametrize("prime", [97, 91, 101])  # 97 ≡ 1 (mod 3); 91 = 7 · 13; 101 > 99 slots
def test_a_prime_that_cannot_serve_is_refused_with_one_that_can(prime):
    with pytest.raises(UserError, match=rf"magic_prime {prime} .* at most 99, .* the largest such is 89"):
        Contexts(STREAM, 10, 1, prime=prime)
