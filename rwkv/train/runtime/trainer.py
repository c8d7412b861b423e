"""The Lightning trainer out of the flags."""

import logging
import warnings
from typing import Literal

import torch

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.train.runtime import cpu, strategy
from rwkv.train.runtime.lightning import pl


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
    """fp32, tf32, bf16 or fp16: what --precision auto comes to on this machine, by the features of its processors."""
    if c.precision != "auto":
        return c.precision
    if on_gpu(c):
        # torch ≥ 2.4's is_bf16_supported() is True where bf16 is emulated.
        return "bf16" if all(major >= 8 for major, _ in _capabilities()) else "fp32"
    return cpu.precision()


def slow_on_gpu(c: TrainConfig, precision: str) -> str:
    """What to tell of `precision`, which was chosen, where a GPU would be faster with another; empty where it would not."""
    if precision != "fp32" or not on_gpu(c) or min(_capabilities()) < (7, 0):  # Volta has the first tensor cores
        return ""
    i = _capabilities().index(min(_capabilities()))
    return (
        f"note:  {torch.cuda.get_device_name(i)} does not multiply bf16, so --precision auto is fp32; --precision fp16 would be several times"
        " faster there, with less range: large activations may overflow"
    )


def _capabilities() -> list[tuple[int, int]]:
    """Compute capability of every visible GPU."""
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


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
