"""The validation loss."""

import math

import torch
from torch.utils.data import DataLoader

from rwkv.data.dataset import ValidationSamples
from rwkv.train.loop.module import TrainingModule
from rwkv.train.runtime import strategy


@torch.no_grad()
def validate(module: TrainingModule, samples: ValidationSamples, batch_size: int) -> list[float]:
    """The mean loss over all targets (or pairs) of all ranks that contribute, without dropout, and
    the means of the objective's metrics; NaN if there are no targets.

    Does not change the state of the random number generators, so validation does not affect
    training.
    """
    samples.rank, samples.world_size = module.trainer.global_rank, module.trainer.world_size
    training = module.model.training
    module.model.eval()
    # sums of losses and metrics, number of targets
    total = torch.zeros(2 + len(module.objective.METRICS), device=module.device, dtype=torch.float64)
    with module.trainer.precision_plugin.forward_context():
        for batch in DataLoader(samples, batch_size, generator=torch.Generator()):
            found = module.mean_loss(module.transfer_batch_to_device(batch, module.device, 0))
            means = [found.mean.double()[None], total.new_ones(1)]
            if found.metrics is not None:
                means.insert(1, found.metrics.double())
            total += torch.cat(means) * found.count
    module.model.train(training)
    *sums, targets = strategy.mean(total).tolist()
    return [value / targets if targets else math.nan for value in sums]
