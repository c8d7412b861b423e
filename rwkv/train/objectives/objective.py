"""The interface between an objective and the training loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rwkv.models import RWKV

Hidden = Callable[[Tensor, Tensor | None], Tensor]
"""(tokens [B, T], reset bool [B, T] or None) → the head's input [B, T, D]."""


@dataclass(frozen=True)
class Loss:
    """The loss of a batch.

    Attributes:
        mean: scalar fp32, over `count` parts; 0 if there are none.
        count: what the mean is over: targets, or pairs.
        metrics: fp32 [len(Objective.METRICS)], means over the same parts, detached; None without
            metrics.
    """

    mean: Tensor
    count: int
    metrics: Tensor | None = None


class Objective(Protocol):
    """What a run minimises.

    Attributes:
        METRICS: names of further values of a step, in metrics.jsonl; of a validation, with `val_`
            before them.
        UNIT: the unit of the loss, for display.
    """

    METRICS: tuple[str, ...]
    UNIT: str

    def loss(self, model: RWKV, hidden: Hidden, batch: Sequence[Tensor], resets: bool) -> Loss:
        """The loss of a batch.

        Args:
            model: for its head; `hidden` runs the rest.
            batch: tensors of the samples, on the model's device except for a loss mask.
            resets: whether the state is reset where documents begin.
        """
        ...
