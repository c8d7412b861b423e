"""Training samples from a token stream: windows of ctx_len tokens, or whole documents."""

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
    """`samples` samples per epoch and rank, each a pure function of (seed, epoch, index, rank,
    world_size).

    An item is (x, y), each int64 [ctx_len], with y shifted by one token; or (x, y, loss_mask,
    reset) if the stream is masked, samples are padded or `reset` is set. loss_mask: bool [ctx_len],
    True where y contributes to the loss. reset: bool [ctx_len], True where x starts a document.
    With `reset`, the first token of a document is not a target. Set `epoch` before each epoch.
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
        """Global index of sample `index` of this epoch and rank, unique within a run."""
        return (self.epoch * self.samples + index) * self.world_size + self.rank

    @abstractmethod
    def window(self, number: int) -> tuple[int, int]:
        """Begin and end of sample `number` in the stream; at most ctx_len + 1 tokens."""

    @abstractmethod
    def sequential_window(self, i: int) -> tuple[int, int]:
        """Begin and end of the i-th of the `per_pass` samples that cover the stream once, in
        order.
        """

    @property
    @abstractmethod
    def per_pass(self) -> int:
        """Number of samples that cover the stream once."""

    @property
    def plain(self) -> bool:
        """Whether every sample has the same weight in the loss; items are (x, y) then, except those
        of Pairs.
        """
        return not (self.reset or self.stream.masked)

    def sequences(self, number: int) -> list[tuple[int, int]]:
        """Begin and end of the sequences that the model reads for sample `number`."""
        return [self.window(number)]

    def sequence(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """A sequence of `sequences`, as an item of windows or documents."""
        return self.item(begin, end)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.item(*self.window(self.number(index)))

    def item(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """The sample with tokens [begin, end) of the stream."""
        if self.plain:
            window = torch.from_numpy(self.stream.ids(begin, end))
            return window[:-1], window[1:]
        padding = self.ctx_len + 1 - (end - begin)
        parts = self.stream.read(begin, end)
        ids, loss_mask, starts = (torch.from_numpy(np.pad(part, (0, padding))) for part in parts)
        if self.reset:
            loss_mask &= ~starts
        return ids[:-1], ids[1:], loss_mask[1:], starts[:-1] if self.reset else torch.zeros_like(starts[:-1])


@dataclass
class Contexts(Samples):
    """Windows of the stream that cross document boundaries, as in upstream's binidx mode.

    Offsets come from prime sampling if `prime` > 0 (after `random_first` − 1 uniformly random
    samples), else they are uniformly random.

    Raises:
        UserError: the stream is shorter than one sample; `prime` is not valid for this stream.
    """

    prime: int = 0
    shift: int = 0
    random_first: int = 0

    def __post_init__(self):
        size = len(self.stream)
        if size < self.ctx_len + 2:
            raise UserError(
                f"the data has {size} tokens, but one sample of ctx_len {self.ctx_len} needs {self.ctx_len + 2}; use more text"
                + (f", or --ctx_len {size - 2} or less" if size > 2 else "")
            )
        if self.prime:
            slots = offsets.slots(size - self.shift, self.ctx_len)
            best = offsets.magic_prime(size - self.shift, self.ctx_len)
            if self.prime > slots or self.prime % 3 != 2 or not offsets.is_prime(self.prime):
                raise UserError(
                    f"magic_prime {self.prime} must be a prime p with p mod 3 = 2 and p <= {slots}, the number of contexts in the data;"
                    f" the largest is {best or 'none: the data is too short for prime sampling'}"
                )

    def offset(self, index: int) -> int:
        """Offset of sample `index` of this epoch and rank."""
        return self.window(self.number(index))[0]

    def window(self, number: int) -> tuple[int, int]:
        if self.prime and 1 + number >= self.random_first:
            begin = offsets.prime_offset(1 + number - self.random_first, self.prime, self.ctx_len, self.shift)
        else:
            begin = offsets.random_offset(self.seed, number, len(self.stream), self.ctx_len)
        return begin, begin + self.ctx_len + 1

    def sequential_window(self, i: int) -> tuple[int, int]:
        return i * self.ctx_len, (i + 1) * self.ctx_len + 1

    @property
    def per_pass(self) -> int:
        return offsets.slots(len(self.stream), self.ctx_len)


@dataclass(frozen=True)
class Packed:
    """Samples of whole documents.

    Attributes:
        windows: int64 [k, 2], begin and end of each sample in the stream.
        too_long: documents skipped because they are longer than ctx_len + 1 tokens.
        too_short: documents skipped because one token has no target.
    """

    windows: np.ndarray
    too_long: int
    too_short: int


def pack(starts: np.ndarray, ctx_len: int, min_tokens: int) -> Packed:
    """Concatenate documents in order until a sample has `min_tokens` tokens or the next document
    does not fit; none is split.

    Args:
        starts: int64 [n + 1], starts of the n documents, strictly ascending, then the end of the
            last.
        ctx_len: context length; a sample has at most ctx_len + 1 tokens, as the last is only a
            target.
        min_tokens: length from which a sample is complete; at most ctx_len.
    """
    edges = array("q", starts.astype(np.int64).tobytes())  # item access is faster than numpy's
    limit = ctx_len + 1
    windows, too_long, too_short, i, last = array("q"), 0, 0, 0, len(starts) - 1
    while i < last:
        begin = edges[i]
        if edges[i + 1] - begin > limit:
            too_long, i = too_long + 1, i + 1
            continue
        j = min(last, bisect.bisect_left(edges, begin + min_tokens, i + 1))
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
    """Samples of whole documents (see `pack`), padded with token 0, which is masked out of the
    loss.

    A pass visits every sample once, in order if `sequential`, else in a new random order per pass;
    samples are sharded over the ranks.

    Raises:
        UserError: no document fits a context.
    """

    min_tokens: int = 1
    sequential: bool = False
    packed: Packed = field(init=False)

    def __post_init__(self):
        self.packed = pack(self.stream.document_starts(), self.ctx_len, self.min_tokens)
        if not len(self.packed.windows):
            raise UserError(
                f"none of {self.packed.too_long + self.packed.too_short} documents has 2 to {self.ctx_len + 1} tokens, as --doc_training with"
                f" --ctx_len {self.ctx_len} needs; use a larger --ctx_len, the correct --doc_sep, or omit --doc_training"
            )

    @property
    def plain(self) -> bool:
        return False

    def window(self, number: int) -> tuple[int, int]:
        pass_number, position = divmod(number, self.per_pass)
        return self.sequential_window(
            position if self.sequential else offsets.shuffled(self.seed, pass_number, position, self.per_pass)
        )

    def sequential_window(self, i: int) -> tuple[int, int]:
        begin, end = self.packed.windows[i].tolist()
        return begin, end

    @property
    def per_pass(self) -> int:
        return len(self.packed.windows)


@dataclass
class ValidationSamples(torch.utils.data.Dataset):
    """A fixed set of `count` samples spread evenly over one pass of a validation stream; all of
    them if count is 0 or larger.

    Ranks get equally many samples, as every forward pass is a collective operation under ZeRO-3. If
    their number is not a multiple of world_size, items always have a loss_mask (of windows: x, y,
    loss_mask, reset), and the last item of some ranks is padding with an all-False loss_mask.
    """

    source: Samples
    count: int
    rank: int = 0
    world_size: int = 1

    @property
    def total(self) -> int:
        """Samples over all ranks."""
        return min(self.count or self.source.per_pass, self.source.per_pass)

    def __len__(self) -> int:
        return -(-self.total // self.world_size)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self.rank + index * self.world_size
        item = self.source.item(
            *self.source.sequential_window(
                offsets.spread(min(number, self.total - 1), self.total, self.source.per_pass)
            )
        )
        if self.total % self.world_size == 0:
            return item
        x, y, *rest = item
        loss_mask, last = rest or (torch.ones_like(y, dtype=torch.bool), torch.zeros_like(x, dtype=torch.bool))
        return x, y, loss_mask & (number < self.total), last
