"""The Lightning module: training step, data loader, optimizer, gradient clipping."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rwkv.config import TrainConfig
from rwkv.data.batches import Batches
from rwkv.data.dataset import Samples
from rwkv.kernels.linear import Matrix
from rwkv.models import RWKV
from rwkv.train.loop import adam, optimizer, schedule
from rwkv.train.loop.adamw8bit import AdamW8bit
from rwkv.train.loop.cuda_graph import GraphedBlocks
from rwkv.train.loop.optimizer import skip_step_unless_finite
from rwkv.train.objectives import choose
from rwkv.train.objectives.objective import Loss
from rwkv.train.runtime import fused_adam, ranks, strategy
from rwkv.train.runtime.lightning import pl


class TrainingModule(pl.LightningModule):
    """Trains an RWKV model with an objective on `Batches`.

    The loss of an optimizer step is the mean over all targets (or pairs) of its global batch (all
    micro-batches of all ranks), even if they are unevenly distributed; so is the gradient.

    To Lightning the whole run is one epoch; the project's epochs are numbers of steps. The content
    of a batch depends only on its index, so training can start at any step.

    Args:
        begin: optimizer steps and samples (over all ranks) before this process's first step,
            counted from epoch 0; rank 0's value is used on all ranks. None: the start of the run.
        end: the last step, counted from epoch 0; rank 0's value is used on all ranks. None: that of
            the schedule.
        facts: values that must be the same on all ranks (ranks.facts).

    Attributes:
        objective: what is minimised.
        metrics: of the last micro-batch, those of the objective; None if it has none.
        loss: of the last micro-batch, a detached scalar, scaled so that the mean over all
            micro-batches and ranks is the loss of the step.
        targets: of the last micro-batch, a scalar on the device, scaled so that the sum over
            micro-batches, averaged over ranks, is the number of targets in the step.
        grad_norm: of the last optimizer step over all ranks, before clipping; None if the strategy
            does not provide it.
        stop: set to end the run: it ends after the current step if any rank has set it.
    """

    device: torch.device  # set by Lightning

    def __init__(
        self,
        model: RWKV,
        data: Samples,
        config: TrainConfig,
        begin: tuple[int, int] | None = None,
        facts: dict[str, Any] | None = None,
        end: int | None = None,
    ):
        super().__init__()
        self.end = schedule.first_step(config) + schedule.total_steps(config) if end is None else end
        self.model, self.data, self.config, self._facts = model, data, config, facts or {}
        self.objective = choose.of(config)
        self.metrics: Tensor | None = None
        self.begin = begin or (schedule.first_step(config), schedule.first_sample(config))
        self.loss, self.targets, self.stop = torch.tensor(float("nan")), torch.tensor(0), False
        self.grad_norm: Tensor | None = None
        self._accumulated = 0  # micro-batches of this optimizer step before the current one
        self._targets: Tensor | float = 1.0  # targets of this optimizer step, averaged over the ranks
        self._freed = 0  # the last step whose gradients were freed
        self._graph = GraphedBlocks(model) if config.cuda_graph == "on" else None

    @property
    def step(self) -> int:
        """Completed optimizer steps, counted from epoch 0."""
        return self.begin[0] + self.trainer.global_step

    @property
    def samples(self) -> int:
        """Samples used so far over all ranks, counted from epoch 0."""
        return self.begin[1] + self.trainer.global_step * schedule.samples_per_step(self.config)

    def setup(self, stage: str) -> None:
        ranks.compare(self._facts)
        # only rank 0 has read the run's folder
        shared = (self.begin, self.end, self.data.seed)
        self.begin, self.end, self.data.seed = self.trainer.strategy.broadcast(shared)
        # for dropout, whose masks must differ between ranks; a restored state replaces it
        torch.manual_seed(self.data.seed + self.trainer.global_rank)

    def transfer_batch_to_device(
        self, batch: Sequence[Tensor], device: torch.device, dataloader_idx: int
    ) -> list[Tensor]:
        # the loss mask (2) and number of targets (4) stay on the CPU, where their values are needed
        return [part.to(device, non_blocking=True) if i in (0, 1, 3) else part for i, part in enumerate(batch)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.config.bf16_copies:
            for layer in self.model.modules():
                if isinstance(layer, Matrix):
                    layer.keep_bf16_copy()
        return optimizer.make(self.model, self.config)

    def train_dataloader(self) -> DataLoader:
        c, trainer = self.config, self.trainer
        self.data.rank, self.data.world_size = trainer.global_rank, trainer.world_size
        steps = self.end - self.begin[0]
        first = -(-self.begin[1] // trainer.world_size)
        batches = Batches(self.data, first, max(0, steps), c.micro_bsz, c.accumulate_grad_batches)
        # No workers: a batch is a slice of a memory-mapped file. With its own generator, the loader
        # does not draw a seed from the global one.
        return DataLoader(batches, batch_size=None, pin_memory=self.device.type == "cuda", generator=torch.Generator())

    def on_train_batch_start(self, batch, batch_idx) -> None:
        step = self.step - schedule.first_step(self.config)
        rate = schedule.learning_rate(self.config, step)
        optimizer.set_rates(self.trainer.optimizers[0], rate, schedule.weight_decay(self.config, step))

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *arguments, **keywords) -> None:
        # replaces Lightning's implementation, which does not expose the norm
        if strategy.zero(self.config):  # DeepSpeed clips
            return
        gradients = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.config.grad_clip or math.inf
        if isinstance(own := self.trainer.optimizers[0], adam.FusedAdam):
            self.grad_norm = fused_adam.total_norm([p.grad for p in gradients])
            own.clip = float(torch.clamp(limit / (self.grad_norm + 1e-6), max=1))
        elif isinstance(own, AdamW8bit):
            self.grad_norm = own.set_clip(limit)
        elif hasattr(own, "grad_scale") and self.config.precision != "fp16":  # which has a GradScaler
            self.grad_norm = fused_adam.set_clip(own, limit)
        else:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(gradients, limit).detach()
        # gradients have been all-reduced: every rank decides the same
        if self.config.on_nan == "skip" and self.grad_norm is not None:
            skip_step_unless_finite(optimizer, gradients, self.grad_norm)

    def on_after_backward(self) -> None:
        if self._graph and self.config.accumulate_grad_batches > 1 and self._accumulated == 0:
            self._graph.keep_gradients(list(self.model.parameters()))

    def on_train_batch_end(self, *_) -> None:
        # free gradients before the next forward pass saves activations; Lightning would do it
        # afterwards
        if self.trainer.global_step != self._freed:
            self._freed = self.trainer.global_step
            for parameter in self.parameters():
                parameter.grad = None

    def mean_loss(self, batch: Sequence[Tensor]) -> Loss:
        """The loss of a batch of the objective, from transfer_batch_to_device."""
        return self.objective.loss(self.model, self._hidden, batch, self.data.reset)

    def _hidden(self, x: Tensor, reset: Tensor | None) -> Tensor:
        if self._graph and self.training:
            return self._graph(x, reset)
        return self.plain_hidden(x, reset)

    def plain_hidden(self, x: Tensor, reset: Tensor | None) -> Tensor:
        """tokens [B, T], reset bool [B, T] or None → the head's input [B, T, D], without a CUDA
        graph.
        """
        return self.model.hidden(x, reset=reset)[0]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self._accumulated = batch_idx % self.config.accumulate_grad_batches
        found = self.mean_loss(batch)
        loss, count, self.metrics = found.mean, found.count, found.metrics
        if not self.data.plain:
            # Lightning and the all-reduce weight all micro-batches equally; weight each by its
            # number of targets instead
            accumulate, world_size = self.config.accumulate_grad_batches, self.trainer.world_size
            if self._accumulated == 0:
                self._targets = self._mean_targets(int(batch[4]), loss.device)
            loss = loss * (count * accumulate / self._targets)
            self.targets = loss.detach().new_full((), count * world_size, dtype=torch.float64)
        self.loss = loss.detach()
        return loss

    def _mean_targets(self, mine: int, device: torch.device) -> Tensor | float:
        """The number of targets averaged over ranks, at least 1e-6; with several ranks as an fp32
        scalar on the device.
        """
        if self.trainer.world_size == 1:
            return max(mine, 1e-6)
        return strategy.mean(torch.full((), mine, device=device, dtype=torch.float64)).clamp_min(1e-6).float()
