"""The Lightning trainer out of the flags."""

import logging
import warnings

import pytorch_lightning as pl
import torch

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.train import schedule


def quiet_lightning() -> None:
    """Lightning's own talk is not for the user; what it warns of still is."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")


def make_trainer(c: TrainConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A trainer that runs exactly the steps of the schedule; metrics, progress and checkpoints are the callbacks' business."""
    gpu = torch.cuda.is_available() and c.accelerator != "cpu"
    precision = c.precision if c.precision != "auto" else "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    alone = c.devices * c.num_nodes == 1
    return pl.Trainer(
        accelerator="gpu" if gpu else "cpu" if c.accelerator == "auto" else c.accelerator,
        devices=c.devices,
        num_nodes=c.num_nodes,
        **compat.trainer_options(precision, alone and c.strategy == "auto"),
        max_steps=schedule.total_steps(c),
        max_epochs=-1,
        accumulate_grad_batches=c.accumulate_grad_batches,
        gradient_clip_val=c.grad_clip or None,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
