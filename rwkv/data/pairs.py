"""Training samples of preference data: pairs of documents, with a chosen and a rejected answer to
the same prompt.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rwkv.data import offsets
from rwkv.data.dataset import Samples
from rwkv.errors import UserError


@dataclass
class Pairs(Samples):
    """Samples of two sequences: documents 2i (chosen) and 2i + 1 (rejected) of the stream, each
    padded to ctx_len with token 0, which is masked out of the loss.

    An item is (x, y, loss_mask, reference): x and y int64 [2, ctx_len], y shifted by one token;
    loss_mask bool [2, ctx_len], True where y is a token of an answer; reference fp32 [2], the
    log-probabilities of both answers by the reference model (NaN before they are set). A pass
    visits every pair once, in order if `sequential`, else in a new random order per pass.

    Attributes:
        windows: int64 [k, 3]: begin, begin of the rejected document, and end of each pair.
        too_long: pairs skipped because a document is longer than ctx_len + 1 tokens.
        reference: fp32 [k, 2].

    Raises:
        UserError: the stream has an odd number of documents, or no pair fits.
    """

    sequential: bool = False
    windows: np.ndarray = field(init=False)
    too_long: int = field(init=False)
    reference: Tensor = field(init=False)

    def __post_init__(self):
        starts = self.stream.document_starts()
        if len(starts) % 2 == 0:
            raise UserError(f"{len(starts) - 1} documents, but preference pairs have an even number; convert again")
        every = np.stack([starts[:-2:2], starts[1:-1:2], starts[2::2]], axis=1)
        fits = np.diff(every, axis=1).max(1) <= self.ctx_len + 1
        self.windows, self.too_long = every[fits], int((~fits).sum())
        if not len(self.windows):
            raise UserError(
                f"none of {len(every)} pairs fits --ctx_len {self.ctx_len}: documents have up to {np.diff(starts).max()} tokens; use a larger --ctx_len"
            )
        self.reference = torch.full((len(self.windows), 2), torch.nan)

    @property
    def plain(self) -> bool:
        return True

    def pair(self, number: int) -> int:
        """The pair of sample `number`, an index of `windows` and `reference`."""
        pass_number, position = divmod(number, self.per_pass)
        return position if self.sequential else offsets.shuffled(self.seed, pass_number, position, self.per_pass)

    def window(self, number: int) -> tuple[int, int]:
        return self.sequential_window(self.pair(number))

    def sequential_window(self, i: int) -> tuple[int, int]:
        begin, _, end = self.windows[i].tolist()
        return begin, end

    @property
    def per_pass(self) -> int:
        return len(self.windows)

    def item(self, begin: int, end: int) -> tuple[Tensor, ...]:
        i = int(np.searchsorted(self.windows[:, 0], begin))
        middle = int(self.windows[i, 1])
        chosen, rejected = (self.sequence(*span)[:3] for span in ((begin, middle), (middle, end)))
        x, y, loss_mask = (torch.stack(both) for both in zip(chosen, rejected, strict=True))
        return x, y, loss_mask, self.reference[i]

    def sequences(self, number: int) -> list[tuple[int, int]]:
        begin, middle, end = self.windows[self.pair(number)].tolist()
        return [(begin, middle), (middle, end)]

    def sequence(self, begin: int, end: int) -> tuple[Tensor, ...]:
        padding = self.ctx_len + 1 - (end - begin)
        parts = self.stream.read(begin, end)
        ids, loss_mask, starts = (torch.from_numpy(np.pad(part, (0, padding))) for part in parts)
        return ids[:-1], ids[1:], loss_mask[1:], torch.zeros_like(starts[:-1])
