"""The Lightning module: batches in, one training step of an RWKV model, rates by the schedule."""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rwkv.config import TrainConfig
from rwkv.data.dataset import Samples
from rwkv.model import RWKV
from rwkv.model.loss import head_loss
from rwkv.train import optimizer, pieces, schedule


class TrainingModule(pl.LightningModule):
    """Cross-entropy with L2Wrap on batches of (x, y) or (x, y, counts, reset), [B, T] each; rates are set before every optimizer step.

    Attributes:
        loss: of the last batch, detached, not divided by the accumulation. Its mean over the ranks is the mean over the counted targets of all.
        targets: counted in the last batch, over all ranks.
    """

    def __init__(self, model: RWKV, data: Samples, config: TrainConfig):
        super().__init__()
        self.model, self.data, self.config = model, data, config
        self.loss, self.targets = torch.tensor(float("nan")), 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer.make(self.model, self.config)

    def train_dataloader(self) -> DataLoader:
        # A batch is a slice of a memory-mapped file: cheaper in this process than from a worker.
        self.data.rank, self.data.world_size = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(self.data, self.config.micro_bsz, pin_memory=self.device.type == "cuda")

    def on_train_epoch_start(self) -> None:
        self.data.epoch = self.config.epoch_begin + self.trainer.current_epoch

    def on_train_batch_start(self, batch, batch_idx) -> None:
        step = self.trainer.global_step
        rate = schedule.learning_rate(self.config, step)
        optimizer.set_rates(self.optimizers().optimizer, rate, schedule.weight_decay(self.config, step))

    def mean_loss(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean loss over the counted targets of a batch, 0 if there is none, and how many they are."""
        x, y, counts, reset = (*batch, None, None)[:4]
        reset = reset if self.data.reset else None
        count = torch.tensor(y.numel(), device=y.device) if counts is None else counts.sum()
        if 0 < self.config.tbptt_len < y.shape[1]:
            return pieces.mean_loss(self.model, x, y, counts, reset, self.config.tbptt_len, self.config.exact), count
        hidden, _ = self.model.hidden(x, reset=reset)
        return head_loss(hidden, self.model.head.weight, y, counts), count

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss, count = self.mean_loss(batch)
        if not self.data.plain:
            # Ranks count differently many targets, and their gradients are averaged: each weighs as much as it counts.
            average = self.trainer.strategy.reduce(count.float(), reduce_op="mean")
            self.targets = round(float(average) * self.trainer.world_size)
            loss = loss * (count / average.clamp_min(1e-6))
        self.loss = loss.detach()
        return loss
