"""The Lightning trainer out of the flags."""

import logging
import warnings
from typing import Literal

import torch

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.train import cpu, strategy
from rwkv.train.lightning import pl


def quiet_lightning() -> None:
    """Lightning's own talk is not for the user; what it warns of still is."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A run that is finished already has an empty loader.
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*returned 0 length.*|.*across ranks is zero.*")
    warnings.filterwarnings("ignore", ".*DeepSpeed handles gradient clipping internally.*")  # as it should


def on_gpu(c: TrainConfig) -> bool:
    """Whether the run is on a GPU."""
    return torch.cuda.is_available() and c.accelerator != "cpu"


def precision_of(c: TrainConfig) -> Literal["fp32", "tf32", "bf16", "fp16"]:
    """fp32, tf32, bf16 or fp16: what --precision auto comes to on this machine."""
    if c.precision != "auto":
        return c.precision
    if on_gpu(c):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return cpu.precision()


def make_trainer(c: TrainConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A trainer that runs the module's batches once; metrics, progress and checkpoints are the callbacks' business."""
    gpu, precision = on_gpu(c), precision_of(c)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    trainer = pl.Trainer(
        accelerator="gpu" if gpu else "cpu" if c.accelerator == "auto" else c.accelerator,
        devices=c.devices,
        num_nodes=c.num_nodes,
        **compat.trainer_options(precision, strategy.make(c, gpu)),
        max_epochs=1,
        accumulate_grad_batches=c.accumulate_grad_batches,
        gradient_clip_val=c.grad_clip or None,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if gpu and getattr(trainer.precision_plugin, "scaler", None):
        trainer.precision_plugin.scaler = compat.grad_scaler()()
    return trainer
