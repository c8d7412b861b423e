"""Whole documents side by side in samples: which stretches of a stream hold documents that fit a context."""

import bisect
from array import array
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """Samples of whole documents.

    Attributes:
        windows: [k, 2] int64, where each sample begins and ends in the stream.
        too_long: documents left out, as they do not fit a context.
        too_short: documents left out, as they hold no target.
    """

    windows: np.ndarray
    too_long: int
    too_short: int


def pack(starts: np.ndarray, ctx_len: int, enough: int) -> Packed:
    """Join documents, in their order, until a sample has `enough` tokens or the next document would not fit; none is cut.

    Args:
        starts: [n + 1] int64, where the n documents start, strictly ascending, and last where they end.
        ctx_len: positions of a context. A sample holds one token more at most: the last is only a target.
        enough: tokens of a sample that takes no further document; at most ctx_len.
    """
    edges, limit = (
        array("q", starts.astype(np.int64).tobytes()),
        ctx_len + 1,
    )  # an array's items are read faster than numpy's
    windows, too_long, too_short, i, last = array("q"), 0, 0, 0, len(starts) - 1
    while i < last:
        begin = edges[i]
        if edges[i + 1] - begin > limit:
            too_long, i = too_long + 1, i + 1
            continue
        j = min(last, bisect.bisect_left(edges, begin + enough, i + 1))
        if edges[j] - begin > limit:
            j -= 1
        if edges[j] - begin > 1:
            windows.extend((begin, edges[j]))
        else:
            too_short += 1
        i = j
    return Packed(np.array(windows, dtype=np.int64).reshape(-1, 2), too_long, too_short)
