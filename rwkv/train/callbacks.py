"""What happens around the training steps: metrics, progress bar, logs, checkpoints."""

import datetime
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from rwkv.config import TrainConfig
from rwkv.data.dataset import HeldOut
from rwkv.errors import UserError
from rwkv.files import whole
from rwkv.train import schedule
from rwkv.train.validation import held_out_loss


class Metrics(pl.Callback):
    """One line per optimizer step in metrics.jsonl, the progress bar, upstream's train_log.txt, wandb if asked for.

    Steps count from the first epoch, so that a run with epoch_begin goes on in the same files; lines of later steps are dropped.

    Attributes:
        losses: of every step, averaged over devices and accumulated batches, nats per token.
        held_out_losses: after every val_every-th step, every epoch and the last step, if there are held-out samples.
    """

    def __init__(self, config: TrainConfig, folder: Path, held_out: HeldOut | None = None):
        self.config, self.folder, self._held_out = config, folder, held_out
        self.losses: list[float] = []
        self.held_out_losses: list[float] = []
        self._batches: list[float] = []
        self._targets = 0
        self._epoch: list[float] = []
        self._wandb: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._tick = time.perf_counter()
        self._bar = tqdm(
            total=schedule.total_steps(self.config),
            unit="step",
            desc="train",
            mininterval=0.5 if sys.stderr.isatty() else 15,
            disable=trainer.global_rank > 0,
        )
        if trainer.global_rank == 0:
            _keep_steps(self.folder / "metrics.jsonl", schedule.first_step(self.config))
            self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, open for the length of the run
            self._log(f"NEW RUN {datetime.datetime.now():%Y-%m-%d-%H-%M-%S}\n{vars(self.config)}\n")
            if self.config.wandb:
                self._wandb = _start_wandb(self.config, self.folder)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx: int) -> None:
        self._batches.append(float(trainer.strategy.reduce(module.loss, reduce_op="mean")))
        self._targets += module.targets
        if trainer.global_step == len(self.losses):  # gradients are still being accumulated
            return
        loss, self._batches = sum(self._batches) / len(self._batches), []
        self.losses.append(loss)
        self._epoch.append(loss)
        targets, self._targets = self._targets, 0
        spent = time.perf_counter() - self._tick
        extra = {} if module.data.plain else {"targets": targets}
        if self._held_out is not None and math.isfinite(loss) and self._validates():
            self.held_out_losses.append(held_out_loss(module, self._held_out, self.config.micro_bsz))
            extra["val_loss"] = self.held_out_losses[-1]
        if trainer.global_rank == 0:
            self._report(module, loss, spent, extra)
        self._tick = time.perf_counter()
        if not math.isfinite(loss):
            step = schedule.first_step(self.config) + len(self.losses)
            raise UserError(
                f"step {step}: the loss is {loss}. Lower --lr_init, or raise the precision, and go on from an earlier checkpoint in {self.folder}"
            )

    def _validates(self) -> bool:
        """Whether the held-out loss is due after this step."""
        step = schedule.first_step(self.config) + len(self.losses)
        every = self.config.val_every
        ends = step % schedule.steps_per_epoch(self.config) == 0 or len(self.losses) == schedule.total_steps(self.config)
        return ends or (every > 0 and step % every == 0)

    def _report(self, module: pl.LightningModule, loss: float, seconds: float, extra: dict[str, Any]) -> None:
        step = schedule.first_step(self.config) + len(self.losses)
        tokens = schedule.tokens_per_step(self.config)
        speed = tokens / seconds
        group = module.optimizers().optimizer.param_groups[0]
        line = {
            "step": step,
            "loss": loss if math.isfinite(loss) else None,
            **{key: value if math.isfinite(value) else None for key, value in extra.items()},
            "lr": group["lr"] / group["lr_scale"],
            "tokens": step * tokens,
            "tokens_per_s": round(speed, 1),
        }
        line |= _memory(module.device)
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        held_out = f", held out {self.held_out_losses[-1]:.3f}" if self.held_out_losses else ""
        self._bar.set_postfix_str(f"loss {loss:.3f}{held_out}, lr {line['lr']:.2e}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update()
        if self._wandb:
            decay = schedule.weight_decay(self.config, len(self.losses) - 1)
            self._wandb.log(
                {"loss": loss, **extra, "lr": line["lr"], "wd": decay, "Gtokens": step * tokens / 1e9, "kt/s": speed / 1e3}, step=step
            )

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self._epoch:
            return
        mean, self._epoch = sum(self._epoch) / len(self._epoch), []
        rate = schedule.learning_rate(self.config, len(self.losses) - 1)
        epoch = self.config.epoch_begin + trainer.current_epoch
        self._log(f"{epoch} {mean:.6f} {math.exp(min(mean, 700)):.4f} {rate:.8f} {datetime.datetime.now()} {trainer.current_epoch}\n")

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        for attribute, close in (("_bar", "close"), ("_metrics", "close"), ("_wandb", "finish")):
            if getattr(self, attribute, None) is not None:
                getattr(getattr(self, attribute), close)()

    def _log(self, text: str) -> None:
        with open(self.folder / "train_log.txt", "a", encoding="utf-8") as file:
            file.write(text)


class Checkpoints(pl.Callback):
    """Saves rwkv-N.pth after every epoch_save-th epoch and the last, rwkv-final.pth where the run ends, or is interrupted, inside an epoch.

    `save(name, step)` writes one. Attribute `last`: the name written last.
    """

    def __init__(self, config: TrainConfig, save: Callable[[str, int], None]):
        self.config, self._save, self.last = config, save, ""

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch, step = trainer.current_epoch, trainer.global_step
        ends = step == schedule.total_steps(self.config)
        if step == (epoch + 1) * schedule.steps_per_epoch(self.config) and (epoch % self.config.epoch_save == 0 or ends):
            self._write(f"rwkv-{self.config.epoch_begin + epoch}.pth", step)
        elif ends:
            self._write("rwkv-final.pth", step)

    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.global_step > 0:
            self._write("rwkv-final.pth", trainer.global_step)

    def _write(self, name: str, step: int) -> None:
        self._save(name, schedule.first_step(self.config) + step)
        self.last = name


def _keep_steps(metrics: Path, last: int) -> None:
    """Drop the lines after step `last`, so that each step stands there once."""
    if metrics.exists():
        # A line without its end is what a crash or a full disk leaves.
        whole_lines = [line for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        lines = [line for line in whole_lines if json.loads(line)["step"] <= last]
        with whole(metrics) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def _memory(device: torch.device) -> dict[str, int]:
    """Largest memory so far, MiB: of this process, and what torch has allocated on its GPU."""
    peak = {"rss_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if device.type == "cuda":
        peak["gpu_peak_mib"] = torch.cuda.max_memory_allocated(device) >> 20
    return peak


def _start_wandb(config: TrainConfig, folder: Path) -> Any:
    import wandb  # a second to import: only where it is asked for

    mode = None if wandb.api.api_key else "offline"
    return wandb.init(project=config.wandb, dir=str(folder), config=vars(config), mode=mode, settings=wandb.Settings(silent=True))
