"""Small datasets of preference pairs, for the tests of several modules."""

from pathlib import Path

import numpy as np
import torch

from rwkv.data import binidx_writer, provenance
from rwkv.data.binidx import MANIFEST

# (prompt, chosen answer, rejected answer) as token ids
Pair = tuple[list[int], list[int], list[int]]


def random_pairs(count: int, seed: int = 0, longest: int = 8) -> list[Pair]:
    """Pairs of random ids from 1 to 40 in prompts; chosen answers have ids of 41 to 44, rejected
    ones of 45 to 48, and both end with 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(low, high + 1, (length,), generator=generator).tolist()

    return [(ids(1, 40), [*ids(41, 44), 0], [*ids(45, 48), 0]) for _ in range(count)]


def write(prefix: str | Path, pairs: list[Pair]) -> str:
    """Write a paired binidx; returns its prefix, which must end in `_document`."""
    with binidx_writer.writers([prefix], mask=True) as ([out], _):
        for prompt, *answers in pairs:
            for answer in answers:
                ids, mask = prompt + answer, [0] * len(prompt) + [1] * len(answer)
                out.add_packed(np.array(ids, "<u2").tobytes(), np.array([len(ids)], "<i4").tobytes(), bytes(mask))
        described = {"kind": MANIFEST, "format": provenance.FORMAT, "tokenizer": None, "flags": {}, "sources": []}
        provenance.write(out.manifest, {**described, "paired": True}, out.documents, out.tokens, out.counted)
    return str(prefix)
