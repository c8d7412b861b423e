"""Contexts of a token stream as training samples."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rwkv.data import sampling
from rwkv.errors import UserError


@dataclass
class Contexts(torch.utils.data.Dataset):
    """`samples` contexts per epoch and rank. An item is (x, y), each [ctx_len] int64, y being x one token later.

    As upstream's binidx mode, the stream is one: a context may begin inside a document and cross into the next. Set `epoch`
    before each epoch. Prime sampling if `prime` > 0, uniformly random otherwise.

    Raises:
        UserError: fewer tokens than one context needs; a prime that prime sampling cannot use.
    """

    tokens: np.ndarray
    ctx_len: int
    samples: int
    seed: int = 0
    prime: int = 0
    shift: int = 0
    rank: int = 0
    world_size: int = 1
    epoch: int = 0

    def __post_init__(self):
        size = len(self.tokens)
        if size < self.ctx_len + 2:
            raise UserError(
                f"the data holds {size} tokens, and one context of ctx_len {self.ctx_len} needs {self.ctx_len + 2}; give more text"
                + (f", or --ctx_len {size - 2} or less" if size > 2 else "")
            )
        if self.prime:
            slots = sampling.slots(size - self.shift, self.ctx_len)
            best = sampling.magic_prime(size - self.shift, self.ctx_len)
            if self.prime > slots or self.prime % 3 != 2 or not sampling.is_prime(self.prime):
                raise UserError(
                    f"magic_prime {self.prime} must be a prime, leave 2 when divided by 3, and be at most {slots}, the contexts in the data;"
                    f" the largest such is {best or 'none: the data is too short for prime sampling'}"
                )

    def __len__(self) -> int:
        return self.samples

    def offset(self, index: int) -> int:
        """Where sample `index` of this epoch and rank begins. No two samples of a run share a number."""
        number = (self.epoch * self.samples + index) * self.world_size + self.rank
        if self.prime:
            return sampling.prime_offset(1 + number, self.prime, self.ctx_len, self.shift)
        return sampling.random_offset(self.seed, number, len(self.tokens), self.ctx_len)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        begin = self.offset(index)
        window = torch.from_numpy(self.tokens[begin : begin + self.ctx_len + 1].astype(np.int64))
        return window[:-1], window[1:]
