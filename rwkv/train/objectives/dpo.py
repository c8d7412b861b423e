"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290) on pairs of a chosen and
a rejected answer to the same prompt.

With the log-probabilities π of the answers by the model, and ρ by the reference model:

    reward = β (π − ρ)
    margin = reward of the chosen − reward of the rejected answer
    loss   = −(1 − ε) log σ(margin) − ε log σ(−margin)

ε is the label smoothing of cDPO (Mitchell 2023). With length normalisation π and ρ are divided by
the number of tokens of the answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rwkv.config import TrainConfig
from rwkv.models import RWKV
from rwkv.train.objectives.objective import Hidden, Loss

_STEP = 64  # padding beyond the longest answer of a batch is cut off to a multiple of this


class DPO:
    """The mean loss of pairs. Metrics: the means of the margin, of the accuracy (1 for a positive
    margin, 1/2 if it is 0), and of the rewards.
    """

    METRICS: tuple[str, ...] = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")
    UNIT = "nats per pair"

    def __init__(self, c: TrainConfig):
        self._beta, self._smoothing, self._normalised = c.dpo_beta, c.dpo_label_smoothing, bool(c.dpo_length_norm)
        self._static = c.cuda_graph == "on"

    def loss(self, model: RWKV, hidden: Hidden, batch: Sequence[Tensor], resets: bool) -> Loss:
        """As Objective.loss; every sequence begins a document.

        Args:
            batch: those of rwkv.data.pairs.Pairs: x, y, loss_mask [B, 2, T] and reference [B, 2]. A
                pair without targets does not count.
        """
        x, y, loss_mask, reference = batch[:4]
        present = loss_mask.flatten(1).any(1)  # on the CPU, so that the host does not wait for a GPU
        count = int(present.sum())
        reward = log_probabilities(model, hidden, x, y, loss_mask, self._static) - reference
        if self._normalised:
            reward = reward / loss_mask.sum(2).clamp_min(1).to(x.device)
        reward = self._beta * reward
        chosen, rejected = reward.unbind(1)
        margin = chosen - rejected
        losses = preference_loss(margin, self._smoothing)
        accuracy = (margin > 0).float() + (margin == 0).float() / 2

        def mean(values: Tensor) -> Tensor:
            if count < len(values):
                values = torch.where(present.to(values.device), values, torch.zeros_like(values))
            return values.sum() / max(1, count)

        metrics = torch.stack([mean(values) for values in (margin, accuracy, chosen, rejected)]).detach()
        return Loss(mean(losses), count, metrics)


def preference_loss(margin: Tensor, smoothing: float = 0.0) -> Tensor:
    """The loss of pairs by their margins [B], fp32 [B] (see the module)."""
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def log_probabilities(
    model: RWKV, hidden: Hidden, x: Tensor, y: Tensor, loss_mask: Tensor, static: bool = False
) -> Tensor:
    """The log-probability of every answer, in nats, fp32 [B, 2].

    Args:
        x, y, loss_mask: [B, 2, T] of Pairs; loss_mask on the CPU.
        static: the length may not depend on the batch.
    """
    if not static:
        used = loss_mask.flatten(0, 1).any(0).nonzero()
        length = min(x.shape[2], _STEP * (int(used.max()) // _STEP + 1)) if len(used) else 1
        x, y, loss_mask = (tensor[:, :, :length].contiguous() for tensor in (x, y, loss_mask))
    x, y, loss_mask = (tensor.flatten(0, 1) for tensor in (x, y, loss_mask))
    return model.head(hidden(x, None), y, loss_mask, by_row=True).view(-1, 2)
