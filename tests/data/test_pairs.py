"""Samples of preference pairs: both answers, masked and padded; pairs stay together in a split."""

import numpy as np
import pytest
import torch

from rwkv.data.binidx import Dataset
from rwkv.data.pairs import Pairs
from rwkv.data.token_stream import Stream, split_pairs
from rwkv.errors import UserError
from tests import preference_pairs

PAIRS = preference_pairs.random_pairs(50)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Dataset(preference_pairs.write(tmp_path_factory.mktemp("pairs") / "p_text_document", PAIRS))


def texts(item):
    """The tokens of both sequences, and those that contribute to the loss."""
    x, y, loss_mask, _ = item
    whole = [[int(row[0]), *targets.tolist()] for row, targets in zip(x, y, strict=True)]
    return whole, [targets[mask].tolist() for targets, mask in zip(y, loss_mask, strict=True)]


def test_items(data):
    samples = Pairs(Stream(data), 20, 50, sequential=True)
    samples.reference[:] = torch.arange(100.0).view(50, 2)
    assert (samples.per_pass, samples.too_long, samples.plain) == (50, 0, True)
    for i, (prompt, *answers) in enumerate(PAIRS):
        item = samples[i]
        assert item[0].shape == item[1].shape == item[2].shape == (2, 20)
        whole, counted = texts(item)
        assert whole == [[*prompt, *a] + [0] * (21 - len(prompt) - len(a)) for a in answers]
        assert counted == answers
        assert item[3].tolist() == [2 * i, 2 * i + 1]


def test_every_pair_once_in_a_pass(data):
    ranks = [Pairs(Stream(data), 20, 25, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for epoch in (0, 1):
        for samples in ranks:
            samples.epoch = epoch
        found = [texts(samples[i])[1] for samples in ranks for i in range(25)]
        assert sorted(found) == sorted([chosen, rejected] for _, chosen, rejected in PAIRS)
        assert found != [[chosen, rejected] for _, chosen, rejected in PAIRS]


def test_too_long_and_odd(data, make_stream):
    longest = max(len(prompt) + max(map(len, answers)) for prompt, *answers in PAIRS)
    samples = Pairs(Stream(data), longest - 2, 1, sequential=True)
    expected = [p for p in PAIRS if len(p[0]) + max(map(len, p[1:])) <= longest - 1]
    assert 0 < len(expected) == samples.per_pass == 50 - samples.too_long < 50
    assert [texts(samples[i])[1] for i in range(samples.per_pass)] == [[a, b] for _, a, b in expected]
    with pytest.raises(UserError, match="3 documents, but preference pairs have an even number"):
        Pairs(make_stream([[1, 2, 0]] * 3), 8, 1)


def test_split_keeps_pairs_together(data):
    sides = split_pairs(data, 0.3)
    streams = [Pairs(Stream(data, spans), 20, 1, sequential=True) for spans in sides]
    found = [[texts(samples[i])[1] for i in range(samples.per_pass)] for samples in streams]
    assert 5 < len(found[1]) < 25
    assert sorted(found[0] + found[1]) == sorted([a, b] for _, a, b in PAIRS)
    few = split_pairs(data, 0.01)
    assert [int(np.diff(spans).sum()) for spans in few] == [len(data.tokens) - (n := sum(map(len, last_pair()))), n]


def test_split_leaves_a_pair_on_each_side(data):
    with pytest.raises(UserError, match="--val_split 0.999: leaves none of 50 pairs for training"):
        split_pairs(data, 0.999)


def last_pair():
    prompt, *answers = PAIRS[-1]
    return [prompt + answer for answer in answers]
