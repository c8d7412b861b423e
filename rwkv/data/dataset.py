"""Training samples out of a token stream: contexts of it, or whole documents."""

import bisect
from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rwkv.data import offsets
from rwkv.data.token_stream import Stream
from rwkv.errors import UserError


@dataclass
class Samples(torch.utils.data.Dataset, ABC):
    """`samples` samples per epoch and rank, each a pure function of (seed, epoch, index, rank, world_size).

    An item is (x, y), each [ctx_len] int64, y being x one token later; or (x, y, counts, reset) if the stream is masked, samples are
    padded or `reset` is set: counts [ctx_len] bool, True where y counts in the loss; reset [ctx_len] bool, True where x starts a document.
    With `reset`, what starts a document is no target, as nothing before it belongs to it. Set `epoch` before each epoch.
    """

    stream: Stream
    ctx_len: int
    samples: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    epoch: int = 0
    reset: bool = False

    def __len__(self) -> int:
        return self.samples

    def number(self, index: int) -> int:
        """The number of sample `index` of this epoch and rank: no two samples of a run share one."""
        return (self.epoch * self.samples + index) * self.world_size + self.rank

    @abstractmethod
    def window(self, number: int) -> tuple[int, int]:
        """Where sample `number` begins and ends in the stream; at most ctx_len + 1 tokens."""

    @abstractmethod
    def in_order(self, i: int) -> tuple[int, int]:
        """As `window`, of the i-th of `distinct` samples that go through the stream once."""

    @property
    @abstractmethod
    def distinct(self) -> int:
        """How many samples go through the stream once."""

    @property
    def plain(self) -> bool:
        """Whether items are (x, y)."""
        return not (self.reset or self.stream.masked)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.item(*self.window(self.number(index)))

    def item(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """The sample of tokens [begin, end) of the stream."""
        if self.plain:
            window = torch.from_numpy(self.stream.ids(begin, end))
            return window[:-1], window[1:]
        piece, short = self.stream.read(begin, end), self.ctx_len + 1 - (end - begin)
        ids, counts, starts = (torch.from_numpy(np.pad(part, (0, short))) for part in piece)
        if self.reset:
            counts &= ~starts
        return ids[:-1], ids[1:], counts[1:], starts[:-1] if self.reset else torch.zeros_like(starts[:-1])


@dataclass
class Contexts(Samples):
    """Contexts of the stream, wherever they begin: as in upstream's binidx mode, they cross from one document into the next.

    Prime sampling if `prime` > 0, uniformly random otherwise; and so are the first `random_first` − 1 samples, before it begins.

    Raises:
        UserError: fewer tokens than one context needs; a prime that prime sampling cannot use.
    """

    prime: int = 0
    shift: int = 0
    random_first: int = 0

    def __post_init__(self):
        size = len(self.stream)
        if size < self.ctx_len + 2:
            raise UserError(
                f"the data holds {size} tokens, and one context of ctx_len {self.ctx_len} needs {self.ctx_len + 2}; give more text"
                + (f", or --ctx_len {size - 2} or less" if size > 2 else "")
            )
        if self.prime:
            slots = offsets.slots(size - self.shift, self.ctx_len)
            best = offsets.magic_prime(size - self.shift, self.ctx_len)
            if self.prime > slots or self.prime % 3 != 2 or not offsets.is_prime(self.prime):
                raise UserError(
                    f"magic_prime {self.prime} must be a prime, leave 2 when divided by 3, and be at most {slots}, the contexts in the data;"
                    f" the largest such is {best or 'none: the data is too short for prime sampling'}"
                )

    def offset(self, index: int) -> int:
        """Where sample `index` of this epoch and rank begins."""
        return self.window(self.number(index))[0]

    def window(self, number: int) -> tuple[int, int]:
        if self.prime and 1 + number >= self.random_first:
            begin = offsets.prime_offset(1 + number - self.random_first, self.prime, self.ctx_len, self.shift)
        else:
            begin = offsets.random_offset(self.seed, number, len(self.stream), self.ctx_len)
        return begin, begin + self.ctx_len + 1

    def in_order(self, i: int) -> tuple[int, int]:
        return i * self.ctx_len, (i + 1) * self.ctx_len + 1

    @property
    def distinct(self) -> int:
        return offsets.slots(len(self.stream), self.ctx_len)


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
    edges = array("q", starts.astype(np.int64).tobytes())  # item access is faster than numpy's
    limit = ctx_len + 1
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


@dataclass
class Documents(Samples):
    """Samples of whole documents, padded with token 0, which does not count.

    Documents join until a sample has `enough` tokens; those longer than a context are left out. A pass goes through all samples once,
    in their order if `sequential`, else in a new random order every time; ranks share it out.

    Raises:
        UserError: no document fits a context.
    """

    enough: int = 1
    sequential: bool = False
    packed: Packed = field(init=False)

    def __post_init__(self):
        self.packed = pack(self.stream.document_starts(), self.ctx_len, self.enough)
        if not len(self.packed.windows):
            raise UserError(
                f"none of {self.packed.too_long + self.packed.too_short} documents has 2 to {self.ctx_len + 1} tokens, as --doc_training with"
                f" --ctx_len {self.ctx_len} needs; give a larger --ctx_len, the right --doc_sep, or leave --doc_training out"
            )

    @property
    def plain(self) -> bool:
        return False

    def window(self, number: int) -> tuple[int, int]:
        turn, position = divmod(number, self.distinct)
        return self.in_order(
            position if self.sequential else offsets.shuffled(self.seed, turn, position, self.distinct)
        )

    def in_order(self, i: int) -> tuple[int, int]:
        begin, end = self.packed.windows[i].tolist()
        return begin, end

    @property
    def distinct(self) -> int:
        return len(self.packed.windows)


@dataclass
class HeldOut(torch.utils.data.Dataset):
    """`count` samples spread evenly over those that go through a stream once, the same every time; all if there are fewer, or count is 0.

    They are sharded over the ranks, each of which gets equally many, as under ZeRO-3 every forward pass is a collective operation. Where their number
    is no multiple of world_size, items are (x, y, counts, reset) also of a plain source, and the last of some ranks is padding: its counts are False.
    """

    source: Samples
    count: int
    rank: int = 0
    world_size: int = 1

    @property
    def total(self) -> int:
        """Samples over all ranks."""
        return min(self.count or self.source.distinct, self.source.distinct)

    def __len__(self) -> int:
        return -(-self.total // self.world_size)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self.rank + index * self.world_size
        item = self.source.item(
            *self.source.in_order(offsets.spread(min(number, self.total - 1), self.total, self.source.distinct))
        )
        if self.total % self.world_size == 0:
            return item
        x, y, *rest = item
        counts, reset = rest or (torch.ones_like(y, dtype=torch.bool), torch.zeros_like(x, dtype=torch.bool))
        return x, y, counts & (number < self.total), reset
