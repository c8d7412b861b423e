"""The Lightning module: batches in, one training step of an RWKV model, rates by the schedule."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rwkv.config import TrainConfig
from rwkv.data.batches import Batches
from rwkv.data.dataset import Samples
from rwkv.models import RWKV
from rwkv.train.loop import adam, optimizer, schedule, tbptt
from rwkv.train.loop.optimizer import leave_out_unless_finite
from rwkv.train.runtime import ranks, strategy
from rwkv.train.runtime.lightning import pl


class TrainingModule(pl.LightningModule):
    """Cross-entropy with L2Wrap on `Batches`; rates are set before every optimizer step.

    The loss of an optimizer step is the sum over the targets of its global batch (all micro-batches of all ranks) divided by their number,
    however many of them each micro-batch and each rank has; so is the gradient.

    One epoch of Lightning's is all that this process runs; ours are counted in steps. What a batch holds depends on its number alone, so
    that a run may begin at any step.

    Attributes:
        begin: where this process begins: optimizer steps and samples (over all ranks) before it, from epoch 0. Rank 0's holds for all.
        loss: of the last micro-batch, detached, a scalar: its share of the step's loss, scaled such that the mean over the micro-batches of
            all ranks is the step's loss.
        targets: of the last micro-batch, times the number of ranks, a scalar: the sum over a step's micro-batches, averaged over the ranks, is
            the number of targets in the step. On the device, as nothing in a step waits for it.
        grad_norm: of the last optimizer step, before it was cut to grad_clip, over all ranks; None where the strategy keeps it to itself.
        stop: whether this process was asked to end; the run ends after a step before which any was.
    """

    device: torch.device  # Lightning's

    def __init__(
        self,
        model: RWKV,
        data: Samples,
        config: TrainConfig,
        begin: tuple[int, int] | None = None,
        facts: dict[str, Any] | None = None,
    ):
        """`facts`: what has to be the same on all ranks (ranks.facts)."""
        super().__init__()
        self.model, self.data, self.config, self._facts = model, data, config, facts or {}
        self.begin = begin or (schedule.first_step(config), schedule.first_sample(config))
        self.loss, self.targets, self.stop = torch.tensor(float("nan")), torch.tensor(0), False
        self.grad_norm: Tensor | None = None
        self._targets: Tensor | float = 1.0  # in a rank's micro-batches of the optimizer step, averaged over the ranks
        self._let_go = 0  # the last step whose gradients are gone

    @property
    def step(self) -> int:
        """Optimizer steps made, from epoch 0."""
        return self.begin[0] + self.trainer.global_step

    @property
    def samples(self) -> int:
        """Samples taken, from epoch 0, over all ranks."""
        return self.begin[1] + self.trainer.global_step * schedule.samples_per_step(self.config)

    def setup(self, stage: str) -> None:
        ranks.compare(self._facts)
        # Rank 0 alone has looked into the folder of the run.
        self.begin, self.data.seed = self.trainer.strategy.broadcast((self.begin, self.data.seed))
        # From here on random numbers are for dropout, whose masks differ between ranks; a state that is restored brings its own.
        torch.manual_seed(self.data.seed + self.trainer.global_rank)

    def transfer_batch_to_device(
        self, batch: Sequence[Tensor], device: torch.device, dataloader_idx: int
    ) -> list[Tensor]:
        # All but counts, which say how many rows the head computes, and their sum: the host has to know.
        return [part.to(device, non_blocking=True) if i in (0, 1, 3) else part for i, part in enumerate(batch)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer.make(self.model, self.config)

    def train_dataloader(self) -> DataLoader:
        c, trainer = self.config, self.trainer
        self.data.rank, self.data.world_size = trainer.global_rank, trainer.world_size
        steps = schedule.first_step(c) + schedule.total_steps(c) - self.begin[0]
        first = -(-self.begin[1] // trainer.world_size)
        batches = Batches(self.data, first, max(0, steps), c.micro_bsz, c.accumulate_grad_batches)
        # A batch is a slice of a memory-mapped file: cheaper in this process than from a worker. The loader would take a seed from the
        # run's random numbers, though it needs none.
        return DataLoader(batches, batch_size=None, pin_memory=self.device.type == "cuda", generator=torch.Generator())

    def on_train_batch_start(self, batch, batch_idx) -> None:
        step = self.step - schedule.first_step(self.config)
        rate = schedule.learning_rate(self.config, step)
        optimizer.set_rates(self.trainer.optimizers[0], rate, schedule.weight_decay(self.config, step))

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *arguments, **keywords) -> None:
        # In place of Lightning's, which does the same and keeps the norm to itself.
        if strategy.zero(self.config):  # DeepSpeed holds and clips them
            return
        gradients = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if isinstance(made := self.trainer.optimizers[0], adam.OnePass):
            self.grad_norm = adam.norm([p.grad for p in gradients])
            made.clip = float(torch.clamp((self.config.grad_clip or math.inf) / (self.grad_norm + 1e-6), max=1))
        else:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(gradients, self.config.grad_clip or math.inf).detach()
        # Gradients are averaged over the ranks by now: all see the same.
        if self.config.on_nan == "skip":
            leave_out_unless_finite(optimizer, gradients, self.grad_norm)

    def on_train_batch_end(self, *_) -> None:
        # Lightning lets gradients go after the next forward pass: they would stand beside all that it keeps.
        if self.trainer.global_step != self._let_go:
            self._let_go = self.trainer.global_step
            for parameter in self.parameters():
                parameter.grad = None

    def mean_loss(self, batch: Sequence[Tensor]) -> tuple[Tensor, int]:
        """Mean loss over the targets of a batch that contribute to it, a scalar, and how many they are; 0 if there is none.

        Args:
            batch: x, y, and where not every target contributes counts and reset, [B, T] each, as transfer_batch_to_device makes it.
        """
        x, y = batch[:2]
        counts, reset = batch[2:4] if len(batch) > 2 else (None, None)
        reset = reset if self.data.reset else None
        count = y.numel() if counts is None else int(counts.sum())
        if 0 < self.config.tbptt_len < y.shape[1]:
            return tbptt.mean_loss(self.model, x, y, counts, reset, self.config.tbptt_len, self.config.exact), count
        hidden, _ = self.model.hidden(x, reset=reset)
        return self.model.head(hidden, y, counts), count

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss, count = self.mean_loss(batch)
        if not self.data.plain:
            # Lightning divides each loss by the number of micro-batches, and gradients are averaged over the ranks: as if every micro-batch had as
            # many targets as the others. Each is to weigh as much as it has.
            accumulate, world_size = self.config.accumulate_grad_batches, self.trainer.world_size
            if batch_idx % accumulate == 0:
                self._targets = self._mean_targets(int(batch[4]), loss.device)
            loss = loss * (count * accumulate / self._targets)
            self.targets = loss.detach().new_full((), count * world_size, dtype=torch.float64)
        self.loss = loss.detach()
        return loss

    def _mean_targets(self, mine: int, device: torch.device) -> Tensor | float:
        """Of the ranks' numbers of targets, at least 1e-6; where there are several ranks an fp32 scalar on the device."""
        if self.trainer.world_size == 1:
            return max(mine, 1e-6)
        return strategy.mean(torch.full((), mine, device=device, dtype=torch.float64)).clamp_min(1e-6).float()
