"""Language modelling: cross-entropy of the next token, with L2Wrap."""

from collections.abc import Sequence

from torch import Tensor

from rwkv.config import TrainConfig
from rwkv.models import RWKV
from rwkv.train.objectives import tbptt
from rwkv.train.objectives.objective import Hidden, Loss


class LanguageModel:
    """The mean cross-entropy of all targets that contribute to the loss, in nats."""

    METRICS: tuple[str, ...] = ()
    UNIT = "nats per token"

    def __init__(self, c: TrainConfig):
        self._chunk, self._exact = c.tbptt_len, c.exact

    def loss(self, model: RWKV, hidden: Hidden, batch: Sequence[Tensor], resets: bool) -> Loss:
        """As Objective.loss.

        Args:
            batch: x and y; unless all targets contribute also loss_mask and reset; [B, T] each.
        """
        x, y = batch[:2]
        loss_mask, reset = batch[2:4] if len(batch) > 2 else (None, None)
        reset = reset if resets else None
        count = y.numel() if loss_mask is None else int(loss_mask.sum())
        if 0 < self._chunk < y.shape[1]:
            return Loss(tbptt.mean_loss(model, x, y, loss_mask, reset, self._chunk, self._exact), count)
        return Loss(model.head(hidden(x, reset), y, loss_mask), count)
