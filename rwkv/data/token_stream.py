"""The tokens that a run trains on as one stream: all documents of a binidx end to end, or those of one side of a held-out split."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rwkv.data.binidx import Dataset
from rwkv.errors import UserError

CHATML = (
    50279,
    187,
    50278,
)  # m8than's additions to the 20B vocabulary: opens an answer, followed by a line break, and closes it
_LOOK_BACK = 1 << 16  # tokens before a context that are searched for the opener of the answer it begins in
_CHUNK = 1 << 22


class Piece(NamedTuple):
    """Some tokens in a row."""

    ids: np.ndarray  # [n] int64
    counts: np.ndarray  # [n] bool: the token counts as a target
    starts: np.ndarray  # [n] bool: a document starts with it


class Stream:
    """Tokens of `spans` of a dataset, end to end.

    Args:
        data: the binidx.
        spans: [k, 2] begins and ends in the dataset's tokens, each at a document's edge, ascending; None: everything.
        separator: a document ends after this token too, whatever the index says; −1: the index alone decides.
        chatml: count only answers: from after `<50279> <187>` up to and with `<50278>` (m8than's ChatML ids).
    """

    def __init__(self, data: Dataset, spans: np.ndarray | None = None, separator: int = -1, chatml: bool = False):
        self._data, self._separator, self._chatml = data, separator, chatml
        self._spans = np.array([[0, len(data.tokens)]], dtype=np.int64) if spans is None else spans
        self._ends = np.cumsum(self._spans[:, 1] - self._spans[:, 0])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def masked(self) -> bool:
        """Whether some tokens may not count."""
        return self._data.mask is not None or self._chatml

    def ids(self, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end) of the stream, int64."""
        return self._join([self._data.tokens[a:b] for a, b in self._places(begin, end)]).astype(np.int64)

    def read(self, begin: int, end: int) -> Piece:
        """Tokens [begin, end) of the stream, which of them count, and which start a document."""
        places = list(self._places(begin, end))
        return Piece(
            self.ids(begin, end),
            *(self._join([look(a, b) for a, b in places]) for look in (self._counts, self._starts)),
        )

    def anything_counts(self) -> bool:
        """Whether any token counts, by reading up to the first that does."""
        return any(
            self._counts(low, min(b, low + _CHUNK)).any()
            for a, b in self._spans.tolist()
            for low in range(a, b, _CHUNK)
        )

    def document_starts(self) -> np.ndarray:
        """Where the documents of the whole stream start, ascending from 0, and last its length, int64: by one pass over the file."""
        found, done = [np.zeros(1, np.int64)], 0
        for a, b in self._spans.tolist():
            for low in range(a, b, _CHUNK):
                high = min(b, low + _CHUNK)
                found.append(np.flatnonzero(self._starts(low, high)) + (done + low - a))
            done += b - a
        starts = np.concatenate([*found, [done]])
        return starts[np.diff(starts, prepend=-1) > 0]  # a stream that was cut inside a document has no start at 0

    def _places(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The stretches of the dataset that stream positions [begin, end) are."""
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

    def _counts(self, a: int, b: int) -> np.ndarray:
        mask = self._data.mask
        counts = np.ones(b - a, bool) if mask is None else mask[a:b] != 0
        return counts & self._answers(a, b) if self._chatml else counts

    def _answers(self, a: int, b: int) -> np.ndarray:
        low = max(0, a - _LOOK_BACK)
        opener, line_break, closer = CHATML
        ids, starts = self._data.tokens[low:b], self._starts(low, b)
        event = np.zeros(len(ids) + 1, np.int8)  # what holds from each position on: 1 an answer, -1 none, 0 as before
        event[2 : len(ids) + 1][(ids[:-1] == opener) & (ids[1:] == line_break) & ~starts[1:]] = 1
        event[1:][ids == closer] = -1
        event[np.flatnonzero(starts)] = -1
        latest = np.maximum.accumulate(np.where(event[:-1] != 0, np.arange(len(ids)), 0))
        return (event[latest] == 1)[a - low :]


def split(data: Dataset, share: float, ctx_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Spans of the dataset to train on and to hold out: about `share` of its documents, chosen by their numbers alone.

    The same documents are held out in every run, whatever its seed and flags, also when documents were added at the end. Data of so few
    documents that fewer than two would be held out is cut once instead: its last `share` of tokens is held out.

    Raises:
        UserError: a side would hold less than a context of ctx_len.
    """
    if len(data) * share < 2:
        cut = round(len(data.tokens) * (1 - share))
        train, held = np.array([[0, cut]], dtype=np.int64), np.array([[cut, len(data.tokens)]], dtype=np.int64)
    else:
        train, held = (_spans(data, share, side) for side in (False, True))
    for spans, side in ((train, "to train on"), (held, "held out")):
        size = int((spans[:, 1] - spans[:, 0]).sum())
        if size < ctx_len + 2:
            raise UserError(
                f"--val_split {share}: {size} tokens would be {side}, and one context of ctx_len {ctx_len} needs {ctx_len + 2};"
                " give another share, a smaller --ctx_len, or more text"
            )
    return train, held


def _spans(data: Dataset, share: float, held: bool) -> np.ndarray:
    edges: list[np.ndarray] = []
    last = not held
    for first in range(0, len(data), _CHUNK):
        count = min(_CHUNK, len(data) - first)
        side = np.random.Generator(np.random.Philox(key=[0x5EED, first])).random(count) < share
        changes = np.flatnonzero(np.diff(side, prepend=last))
        edges.append(np.array([data.span(first + int(i))[0] for i in changes], dtype=np.int64))
        last = bool(side[-1])
    if last == held:
        edges.append(np.array([len(data.tokens)], dtype=np.int64))
    points = np.concatenate(edges)
    spans = points.reshape(-1, 2)
    return spans[spans[:, 0] < spans[:, 1]]
