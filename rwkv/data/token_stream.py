"""The tokens of a run as one stream: all documents of a binidx concatenated, or one side of its
train/validation split.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rwkv.data.binidx import Dataset
from rwkv.errors import UserError

# m8than's additions to the 20B vocabulary: start of an answer, the line break after it, end of an
# answer
CHATML = (50279, 187, 50278)
# tokens before a span that are searched for the start of the answer it begins in
_LOOK_BACK = 1 << 16
_CHUNK = 1 << 22


class Tokens(NamedTuple):
    """Consecutive tokens of a stream."""

    ids: np.ndarray  # int64 [n]
    loss_mask: np.ndarray  # bool [n]: True where the token contributes to the loss as a target
    starts: np.ndarray  # bool [n]: True where the token is the first of a document


class Stream:
    """The concatenated tokens of `spans` of a dataset.

    Args:
        data: the binidx.
        spans: [k, 2] begin and end in the dataset's tokens, ascending, at document boundaries;
            None: everything.
        separator: token id that also ends a document; −1: boundaries come from the index alone.
        chatml: train on answers only: from after `<50279> <187>` up to and including `<50278>`
            (m8than's ChatML ids).
    """

    def __init__(self, data: Dataset, spans: np.ndarray | None = None, separator: int = -1, chatml: bool = False):
        self._data, self._separator, self._chatml = data, separator, chatml
        self._spans = np.array([[0, len(data.tokens)]], dtype=np.int64) if spans is None else spans
        self._ends = np.cumsum(self._spans[:, 1] - self._spans[:, 0])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def masked(self) -> bool:
        """Whether some tokens may be masked out of the loss."""
        return self._data.mask is not None or self._chatml

    def ids(self, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of the stream, int64."""
        return self._join([self._data.tokens[a:b] for a, b in self._ranges(begin, end)]).astype(np.int64)

    def read(self, begin: int, end: int) -> Tokens:
        """Tokens [begin, end) of the stream, with their loss mask and document starts."""
        ranges = list(self._ranges(begin, end))
        return Tokens(
            self.ids(begin, end),
            self._join([self._loss_mask(a, b) for a, b in ranges]),
            self._join([self._starts(a, b) for a, b in ranges]),
        )

    def has_targets(self) -> bool:
        """Whether any token contributes to the loss; reads up to the first that does."""
        return any(
            self._loss_mask(low, min(b, low + _CHUNK)).any()
            for a, b in self._spans.tolist()
            for low in range(a, b, _CHUNK)
        )

    def document_starts(self) -> np.ndarray:
        """Starts of the documents in the stream, ascending from 0, and its length last, int64;
        reads the whole file.
        """
        found, done = [np.zeros(1, np.int64)], 0
        for a, b in self._spans.tolist():
            for low in range(a, b, _CHUNK):
                high = min(b, low + _CHUNK)
                found.append(np.flatnonzero(self._starts(low, high)) + (done + low - a))
            done += b - a
        starts = np.concatenate([*found, [done]])
        # a stream split inside a document has no start at 0
        return starts[np.diff(starts, prepend=-1) > 0]

    def _ranges(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges of the dataset's tokens that make up stream positions [begin, end). Raises
        UserError if its files were truncated.
        """
        self._data.check_sizes()
        i = int(np.searchsorted(self._ends, begin, "right"))
        while begin < end:
            low, high = self._spans[i].tolist()
            offset = begin - (int(self._ends[i]) - (high - low))
            length = min(end - begin, high - low - offset)
            yield low + offset, low + offset + length
            begin, i = begin + length, i + 1

    @staticmethod
    def _join(parts: list[np.ndarray]) -> np.ndarray:
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _starts(self, a: int, b: int) -> np.ndarray:
        starts = np.zeros(b - a, bool)
        starts[self._data.starts(a, b) - a] = True
        if self._separator >= 0:
            before = max(0, a - 1)
            ends = self._data.tokens[before : b - 1] == self._separator
            starts[len(starts) - len(ends) :] |= ends
        return starts

    def _loss_mask(self, a: int, b: int) -> np.ndarray:
        mask = self._data.mask
        found = np.ones(b - a, bool) if mask is None else mask[a:b] != 0
        return found & self._answers(a, b) if self._chatml else found

    def _answers(self, a: int, b: int) -> np.ndarray:
        low = max(0, a - _LOOK_BACK)
        opener, line_break, closer = CHATML
        ids, starts = self._data.tokens[low:b], self._starts(low, b)
        # from each position on: 1 in an answer, -1 not, 0 unchanged
        event = np.zeros(len(ids) + 1, np.int8)
        event[2 : len(ids) + 1][(ids[:-1] == opener) & (ids[1:] == line_break) & ~starts[1:]] = 1
        event[1:][ids == closer] = -1
        event[np.flatnonzero(starts)] = -1
        latest = np.maximum.accumulate(np.where(event[:-1] != 0, np.arange(len(ids)), 0))
        return (event[latest] == 1)[a - low :]


def split_pairs(data: Dataset, share: float) -> tuple[np.ndarray, np.ndarray]:
    """As `split`, for preference pairs, whose two documents stay together. If `share` amounts to
    fewer than two pairs, only the last one is used for validation.

    Raises:
        UserError: a side has no pair.
    """
    pairs = len(data) // 2
    if pairs < 2:
        raise UserError(f"--val_split {share}: the data has one pair; use more, or omit the flag")
    if pairs * share < 2:
        cut = data.span(2 * (pairs - 1))[0]
        return np.array([[0, cut]], dtype=np.int64), np.array([[cut, len(data.tokens)]], dtype=np.int64)
    train, validation = (_spans(data, share, side, 2) for side in (False, True))
    for spans, side in ((train, "training"), (validation, "validation")):
        if not len(spans):
            raise UserError(f"--val_split {share}: leaves none of {pairs} pairs for {side}; use another fraction")
    return train, validation


def split(data: Dataset, share: float, ctx_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Spans of the dataset for training and for validation: about `share` of the documents, chosen
    by document number alone.

    The validation documents are the same in every run, whatever its seed and flags, and do not
    change when documents are appended. If fewer than two documents would be chosen, the last
    `share` of the tokens is used instead.

    Raises:
        UserError: a side has fewer tokens than one sample of ctx_len needs.
    """
    if len(data) * share < 2:
        cut = round(len(data.tokens) * (1 - share))
        train, validation = np.array([[0, cut]], dtype=np.int64), np.array([[cut, len(data.tokens)]], dtype=np.int64)
    else:
        train, validation = (_spans(data, share, side) for side in (False, True))
    for spans, side in ((train, "training"), (validation, "validation")):
        size = int((spans[:, 1] - spans[:, 0]).sum())
        if size < ctx_len + 2:
            raise UserError(
                f"--val_split {share}: leaves {size} tokens for {side}, but one sample of ctx_len {ctx_len} needs {ctx_len + 2};"
                " use another fraction, a smaller --ctx_len, or more text"
            )
    return train, validation


def _spans(data: Dataset, share: float, validation: bool, together: int = 1) -> np.ndarray:
    """The spans of one side. together: number of consecutive documents that stay on one side."""
    edges: list[np.ndarray] = []
    last = not validation
    groups = len(data) // together
    for first in range(0, groups, _CHUNK):
        count = min(_CHUNK, groups - first)
        side = np.random.Generator(np.random.Philox(key=[0x5EED, first])).random(count) < share
        changes = np.flatnonzero(np.diff(side, prepend=last))
        edges.append(np.array([data.span(together * (first + int(i)))[0] for i in changes], dtype=np.int64))
        last = bool(side[-1])
    if last == validation:
        edges.append(np.array([len(data.tokens)], dtype=np.int64))
    points = np.concatenate(edges)
    spans = points.reshape(-1, 2)
    return spans[spans[:, 0] < spans[:, 1]]
