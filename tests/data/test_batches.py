"""Micro-batches keep the order of samples and count the targets of their optimizer step."""

import pytest
import torch

from rwkv.data.batches import Batches
from rwkv.data.dataset import Contexts, Documents


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batch_order_and_target_counts(make_stream, accumulate):
    mask = [i % 7 > 3 or i > 300 for i in range(400)]
    samples = Contexts(make_stream([range(400)], mask), 10, 100, seed=3, prime=29, rank=1, world_size=2)
    batches = Batches(samples, 6, 3, 2, accumulate)
    read = [batches[i] for i in range(len(batches))]
    assert len(read) == 3 * accumulate
    for i, (x, y, loss_mask, reset, targets) in enumerate(read):
        expected = [samples[6 + 2 * i + j] for j in range(2)]
        for found, parts in zip((x, y, loss_mask, reset), zip(*expected, strict=True), strict=True):
            assert torch.equal(found, torch.stack(parts))
        begin = 6 + 2 * (i - i % accumulate)
        assert targets == sum(int(samples[begin + j][2].sum()) for j in range(2 * accumulate))
    assert torch.equal(batches[1][0], read[1][0])  # read again, out of order
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_unmasked_batch_is_x_and_y(make_stream):
    assert [len(batch) for batch in Batches(Contexts(make_stream([range(100)]), 10, 8), 0, 2, 2, 2)] == [2] * 4
    assert [len(batch) for batch in Batches(Documents(make_stream([range(1, 9)]), 10, 8), 0, 2, 2, 2)] == [5] * 4
