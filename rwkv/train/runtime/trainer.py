"""Create the Lightning trainer from the flags."""

import logging
import warnings
from typing import Literal

import torch

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.memory import machine
from rwkv.train.run import Run
from rwkv.train.runtime import cpu, fused_adam, strategy
from rwkv.train.runtime.lightning import pl


def quiet_lightning() -> None:
    """Hide Lightning's informational messages, and warnings that do not apply here."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # a completed run has an empty loader
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*returned 0 length.*|.*across ranks is zero.*")
    warnings.filterwarnings("ignore", ".*DeepSpeed handles gradient clipping internally.*")


def precision_of(c: TrainConfig) -> Literal["fp32", "tf32", "bf16", "fp16"]:
    """The precision that --precision auto selects on this machine; any other value unchanged."""
    if c.precision != "auto":
        return c.precision
    if machine.use_gpu(c.accelerator):
        # not is_bf16_supported(): since torch 2.4 it is also True where bf16 is emulated
        return "bf16" if all(major >= 8 for major, _ in _capabilities(c)) else "fp32"
    return cpu.precision()


def slow_on_gpu(c: TrainConfig, precision: str) -> str:
    """A note if the selected `precision` is not the GPU's fastest one; else empty."""
    # Volta (7.0) has the first tensor cores
    if precision != "fp32" or not machine.use_gpu(c.accelerator) or min(_capabilities(c)) < (7, 0):
        return ""
    i = _capabilities(c).index(min(_capabilities(c)))
    return (
        f"note:  {torch.cuda.get_device_name(i)} does not support bf16, so --precision auto is fp32; --precision fp16 would be several times"
        " faster, but large activations may overflow"
    )


def check_fp8(c: TrainConfig) -> None:
    """Raise UserError if torch has no products in FP8 for the devices of a run that uses them."""
    if not (c.adapter and c.adapter.lora_base == "fp8"):
        return
    instead = "use --lora_base int8, of the same size"
    if compat.float8() is None:
        raise UserError(f"--lora_base fp8 needs the modern stack (STACK=modern); here {instead}")
    if machine.use_gpu(c.accelerator) and (lowest := min(_capabilities(c))) < (8, 9):
        name = torch.cuda.get_device_name(_capabilities(c).index(lowest))
        raise UserError(
            f"--lora_base fp8 needs Ada, Hopper or later GPUs (compute capability 8.9), not {name}; {instead}"
        )


def _capabilities(c: TrainConfig) -> list[tuple[int, int]]:
    """Compute capability of the GPUs that the run uses: the first --devices of the visible ones."""
    return [torch.cuda.get_device_capability(i) for i in range(min(c.devices, torch.cuda.device_count()))]


def make_trainer(run: Run, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Create a trainer for one pass over the module's batches; callbacks handle metrics, progress
    and checkpoints.
    """
    c = run.flags
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = c.precision != "fp32"
    trainer = pl.Trainer(
        accelerator="gpu" if run.on_gpu else "cpu",
        devices=c.devices,
        num_nodes=c.num_nodes,
        **compat.trainer_options(c.precision, strategy.make(c, run.on_gpu)),
        max_epochs=1,
        accumulate_grad_batches=c.accumulate_grad_batches,
        gradient_clip_val=c.grad_clip or None,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if run.on_gpu and getattr(trainer.precision_plugin, "scaler", None):
        trainer.precision_plugin.scaler = fused_adam.grad_scaler()()
    return trainer
