"""The validation loss."""

import math

import torch
from torch.utils.data import DataLoader

from rwkv.data.dataset import ValidationSamples
from rwkv.train.loop.module import TrainingModule
from rwkv.train.runtime import strategy


@torch.no_grad()
def validation_loss(module: TrainingModule, samples: ValidationSamples, batch_size: int) -> float:
    """Mean cross-entropy in nats over all targets of all ranks that contribute, without dropout;
    NaN if there are none.

    Does not change the state of the random number generators, so validation does not affect
    training.
    """
    samples.rank, samples.world_size = module.trainer.global_rank, module.trainer.world_size
    training = module.model.training
    module.model.eval()
    total = torch.zeros(2, device=module.device, dtype=torch.float64)  # sum of losses, number of targets
    with module.trainer.precision_plugin.forward_context():
        for batch in DataLoader(samples, batch_size, generator=torch.Generator()):
            loss, count = module.mean_loss(module.transfer_batch_to_device(batch, module.device, 0))
            total += torch.stack([loss.double() * count, total.new_full((), count)])
    module.model.train(training)
    loss, targets = strategy.mean(total).tolist()
    return loss / targets if targets else math.nan
