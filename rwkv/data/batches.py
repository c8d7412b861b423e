"""Batches of training samples, each with the number of targets in its accumulation window."""

import torch
from torch import Tensor
from torch.utils.data import default_collate

from rwkv.data.dataset import Samples


class Batches(torch.utils.data.Dataset):
    """Micro-batches of one rank, read in order: item i has samples `first + i * size` to `first +
    (i + 1) * size - 1`.

    An item is [x, y], each [size, ctx_len], if every target contributes to the loss; otherwise [x,
    y, loss_mask, reset, targets] (see `Samples`). `targets` is the number of unmasked targets in
    all `accumulate` micro-batches of the optimizer step; all of them are read with the first, so
    that each loss can be normalised by the targets of the whole step.

    Args:
        samples: samples of this rank.
        first: index of the first sample of the first optimizer step.
        steps: number of optimizer steps.
        size: samples per micro-batch.
        accumulate: micro-batches per optimizer step.
    """

    def __init__(self, samples: Samples, first: int, steps: int, size: int, accumulate: int):
        self.samples, self.first, self.steps, self.size, self.accumulate = samples, first, steps, size, accumulate
        self._window: dict[int, list[Tensor]] = {}  # micro-batches read and not yet returned
        self._targets = 0

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __getitem__(self, index: int) -> list[Tensor | int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.samples.plain:
            return [*self._read(index)]
        if index not in self._window:
            begin = index - index % self.accumulate
            self._window = {i: self._read(i) for i in range(begin, begin + self.accumulate)}
            self._targets = sum(int(batch[2].sum()) for batch in self._window.values())
        return [*self._window.pop(index), self._targets]

    def _read(self, index: int) -> list[Tensor]:
        begin = self.first + index * self.size
        return default_collate([self.samples[i] for i in range(begin, begin + self.size)])
