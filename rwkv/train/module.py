"""The Lightning module: batches in, one training step of an RWKV model, rates by the schedule."""

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rwkv.config import TrainConfig
from rwkv.data.dataset import Contexts
from rwkv.model import RWKV
from rwkv.model.loss import head_loss
from rwkv.train import optimizer, schedule


class TrainingModule(pl.LightningModule):
    """Cross-entropy with L2Wrap on (x, y) batches, [B, T] each; rates are set before every optimizer step.

    Attributes:
        loss: of the last batch, detached, not divided by the accumulation.
    """

    def __init__(self, model: RWKV, data: Contexts, config: TrainConfig):
        super().__init__()
        self.model, self.data, self.config = model, data, config
        self.loss = torch.tensor(float("nan"))

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

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        hidden, _ = self.model.hidden(x)
        loss = head_loss(hidden, self.model.head.weight, y)
        self.loss = loss.detach()
        return loss
