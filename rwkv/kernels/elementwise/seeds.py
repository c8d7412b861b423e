"""Seeds of dropout, and their repetition where a block is recomputed."""

import threading

import torch
from torch import Tensor


class Seeds:
    """The seeds that are drawn in the first pass over a block; later passes get the same ones:

        seeds = Seeds()
        with seeds:
            block(x)
        with seeds:
            block(x)  # drops the same elements

    Gradient checkpointing recomputes a block so, also in a CUDA graph, where the state of random
    generators cannot be restored.
    """

    _current = threading.local()  # backward passes on GPUs run in threads of their own

    def __init__(self) -> None:
        self._drawn: list[Tensor] = []
        self._used = 0

    def __enter__(self) -> None:
        self._used, self._outer = 0, getattr(Seeds._current, "seeds", None)
        Seeds._current.seeds = self

    def __exit__(self, *_: object) -> None:
        Seeds._current.seeds = self._outer

    def _next(self, device: torch.device) -> Tensor:
        if self._used == len(self._drawn):
            self._drawn.append(_draw_seed(device))
        self._used += 1
        return self._drawn[self._used - 1]


def new_seed(device: torch.device) -> Tensor:
    """A seed for dropout, a scalar int64 on `device`; in a second pass with Seeds, that of the
    first pass.
    """
    seeds: Seeds | None = getattr(Seeds._current, "seeds", None)
    return _draw_seed(device) if seeds is None else seeds._next(device)


def _draw_seed(device: torch.device) -> Tensor:
    """From the CPU's generator; while a CUDA graph is captured, from the GPU's, so that every
    replay draws another one.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.randint(1 << 31, (), device=device)
    return torch.full((), int(torch.randint(1 << 31, ())), device=device)
