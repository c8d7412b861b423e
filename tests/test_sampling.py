"""Sampling of a batch equals a plain implementation that sorts all probabilities."""

import pytest
import torch

from rwkv.errors import UserError
from rwkv.sampling import Sampling, check_sampling, sample_token, sample_tokens

SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(1.0, 0.5),
    Sampling(1.0, 1.0),
    Sampling(0.3, 0.9),
    Sampling(2.0, 0.97, presence_penalty=1.0, frequency_penalty=0.5),
    Sampling(1.0, 1e-9),
]


def plain(logits, sampling, counts, u: float) -> int:
    """The token whose share of the kept probabilities contains u, in descending order."""
    logits = logits.double().clone()
    for token, count in counts.items():
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / sampling.temperature).softmax(0).tolist()
    order = sorted(range(len(logits)), key=lambda i: -probabilities[i])
    kept, total = [], 0.0
    for token in order:
        if kept and total >= sampling.top_p:
            break
        kept.append(token)
        total += probabilities[token]
    reached = 0.0
    for token in kept:
        reached += probabilities[token]
        if reached > u * total:
            return token
    return kept[-1]


@pytest.mark.parametrize("scale", [0.01, 1, 4])  # flat: the 256 likeliest of 1000 tokens do not suffice
def test_equals_plain_sampling(scale):
    torch.manual_seed(0)
    for round in range(3):
        logits = torch.randn(len(SAMPLINGS), 1000) * scale
        counts = [{int(i): 1.5 for i in row.topk(3)[1]} for row in logits]
        generators = [torch.Generator().manual_seed(10 * round + i) for i in range(len(SAMPLINGS))]
        found = sample_tokens(logits, SAMPLINGS, counts, generators)
        for i, sampling in enumerate(SAMPLINGS):
            u = float(torch.rand((), generator=torch.Generator().manual_seed(10 * round + i), dtype=torch.float64))
            # sums in fp32 and fp64 differ in the 6th digit: allow the neighbours of u
            allowed = {plain(logits[i], sampling, counts[i], u + d) for d in (-1e-5, 0, 1e-5)}
            assert found[i] in allowed, (i, round)


def test_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    logits, counts = torch.randn(len(SAMPLINGS), 1000), [{5: 1.0}] * len(SAMPLINGS)

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(len(SAMPLINGS))]

    together = sample_tokens(logits, SAMPLINGS, counts, generators())
    alone = [
        sample_token(row, sampling, count, generator)
        for row, sampling, count, generator in zip(logits, SAMPLINGS, counts, generators(), strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize(
    ("flags", "max_tokens", "seed", "expected"),
    [
        ({"top_p": 7}, 1, 0, "--top_p 7: it must be greater than 0 and at most 1"),
        ({"top_p": 0.0}, 1, 0, "--top_p 0.0"),
        ({"temperature": -1}, 1, 0, "--temperature -1: it must be at least 0"),
        ({"penalty_decay": 1.5}, 1, 0, "--penalty_decay 1.5: it must be from 0 to 1"),
        ({"presence_penalty": 1e9}, 1, 0, "--presence_penalty"),
        ({}, 0, 0, "--max_tokens 0: it must be at least 1"),
        ({}, 1, -2, "--seed -2"),
        ({}, 1, 1 << 64, "--seed"),
    ],
)
def test_invalid_flags(flags, max_tokens, seed, expected):
    with pytest.raises(UserError, match=expected):
        check_sampling(Sampling(**flags), max_tokens, seed)
