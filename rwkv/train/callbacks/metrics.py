"""Record every step: metrics.jsonl, train_log.txt, progress, dashboards, loss.png."""

import contextlib
import datetime
import json
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from rwkv.config import TrainConfig
from rwkv.data.dataset import ValidationSamples
from rwkv.files import disk_errors
from rwkv.train.callbacks import dashboards
from rwkv.train.callbacks.curve import Curve
from rwkv.train.callbacks.memory import MemoryMonitor
from rwkv.train.callbacks.nonfinite import NonFiniteGuard
from rwkv.train.callbacks.plot import plot
from rwkv.train.callbacks.progress import Progress, Speed
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.loop.validation import validate
from rwkv.train.objectives import choose
from rwkv.train.resume import metrics_file
from rwkv.train.resume.tracked_folder import TrackedFolder
from rwkv.train.runtime import strategy, zero
from rwkv.train.runtime.lightning import pl

# minimum interval between two plots: in seconds, and relative to the time of drawing one
_PLOT_SECONDS, _PLOT_FACTOR = 60, 50


def reads_one_step_late(device: torch.device) -> bool:
    """Whether the metrics of a step are read after the next step was launched."""
    return device.type == "cuda"


class PendingScalars:
    """Scalars that are being copied from a device asynchronously."""

    def __init__(self, numbers: torch.Tensor):
        self._numbers, self._arrived = numbers.to("cpu", non_blocking=True), None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """Wait for the copy and return the values."""
        if self._arrived:
            self._arrived.synchronize()
        return self._numbers.tolist()


@dataclass(frozen=True)
class _Step:
    line: dict[str, Any]  # of metrics.jsonl, without values from the device
    samples: int  # up to and including this step, over all ranks
    has_norm: bool
    numbers: PendingScalars


class Metrics(pl.Callback):
    """Writes one line per optimizer step to metrics.jsonl, reports progress, and writes upstream's
    train_log.txt, dashboards and loss.png.

    Steps count from epoch 0. A resumed run drops lines of later steps and appends. Memory and time
    per step do not depend on the number of steps.

    Attributes:
        curve: summary of all lines, including earlier starts of the run (on rank 0).
        validated, val_loss: step and result of the latest validation of this process, on all ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        tracked: TrackedFolder,
        monitor: MemoryMonitor,
        validation: ValidationSamples | None = None,
    ):
        self._monitor = monitor
        self._speed = Speed()
        self.config, self._folder, self._validation = config, tracked, validation
        self.curve = Curve()
        self.validated, self.val_loss = -1, math.nan
        self._batches: list[torch.Tensor] = []
        self._finite = NonFiniteGuard(config, tracked)
        self._unread: list[_Step] = []
        self._progress: Progress | None = None
        self._file: Any = None
        self._dashboards: list[dashboards.Dashboard] = []
        self._next_plot = time.monotonic() + _PLOT_SECONDS

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self._tick, self._last = time.perf_counter(), module.step
        first = schedule.first_step(self.config)
        if trainer.global_rank == 0:
            self.load(module.step)
            with self._disk_errors(metrics_file.NAME):
                self._file = open(self._folder.path() / metrics_file.NAME, "a", encoding="utf-8")  # noqa: SIM115, open for the length of the run
            if module.step == first:
                self._log(f"NEW RUN {datetime.datetime.now():%Y-%m-%d-%H-%M-%S}\n{vars(self.config)}\n")
            with self._disk_errors("tensorboard"):
                self._dashboards = dashboards.make(self.config, self._folder.path(), module.step)
        self._progress = Progress(schedule.total_steps(self.config), module.step - first, quiet=trainer.global_rank > 0)

    def load(self, last: int) -> None:
        """Read the lines of earlier starts up to step `last`, and drop later ones."""
        self.curve = Curve()
        with self._disk_errors(metrics_file.NAME):
            metrics_file.keep_steps(
                self._folder.path() / metrics_file.NAME, last, schedule.first_step(self.config), self._add
            )

    def _add(self, line: dict[str, Any]) -> None:
        self.curve.add(line, (line["step"] - 1) // schedule.steps_per_epoch(self.config))

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainingModule, outputs, batch, batch_idx: int) -> None:
        targets = module.loss.new_zeros(()) if module.data.plain else module.targets
        values = torch.stack([module.loss.double(), targets.double()])
        if module.metrics is not None:
            values = torch.cat([values, module.metrics.double()])
        self._batches.append(values)
        if module.step == self._last:  # gradients are still being accumulated
            return
        self._last = module.step
        batches, self._batches = torch.stack(self._batches), []
        mean, means = batches[:, 0].mean(), batches[:, 2:].mean(0)
        # one all-reduce for all metrics, and for the ranks' requests to stop
        norm = mean.new_full((), math.nan) if module.grad_norm is None else module.grad_norm.to(mean)
        numbers = torch.stack([mean, mean.new_full((), module.stop), norm, batches[:, 1].sum(), *means])
        group = trainer.optimizers[0].param_groups[0]
        line = {
            "step": module.step,
            "lr": group["lr"] / group["lr_scale"],
            "tokens": module.samples * self.config.sequences * self.config.ctx_len,
            "tokens_per_s": round(schedule.tokens_per_step(self.config) / (time.perf_counter() - self._tick), 1),
            **self._monitor.line(),
        }
        self._tick = time.perf_counter()
        self._unread.append(
            _Step(line, module.samples, module.grad_norm is not None, PendingScalars(strategy.mean(numbers)))
        )
        if (
            not reads_one_step_late(module.device)
            or schedule.ends_epoch(self.config, module.step)
            or self._validates(module.step)
        ):
            self.read(trainer, module)
        elif len(self._unread) > 1:
            self._read(trainer, module, self._unread.pop(0))

    def read(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Read all pending metrics. (On a GPU, metrics are read one step late, so that the GPU does
        not idle.) Called before saving.

        Raises:
            UserError: the loss or gradient is NaN or Inf (NonFiniteGuard).
        """
        while self._unread:
            self._read(trainer, module, self._unread.pop(0))

    def _read(self, trainer: pl.Trainer, module: TrainingModule, pending: "_Step") -> None:
        loss, stop, norm, targets, *means = pending.numbers.read()
        trainer.should_stop = stop > 0
        line: dict[str, Any] = {"step": pending.line["step"], "loss": loss} | (
            {"grad_norm": norm} if pending.has_norm else {}
        )
        if not module.data.plain:
            line["targets"] = round(targets)
            line["loss"] = loss if line["targets"] else None  # 0 would be the lowest loss of the run
        names = module.objective.METRICS
        line |= dict(zip(names, means, strict=True))
        if self._validation is not None and math.isfinite(loss) and self._validates(line["step"]):
            self.val_loss, *values = validate(module, self._validation, self.config.micro_bsz)
            self.validated, line["val_loss"] = line["step"], self.val_loss
            line |= {f"val_{name}": value for name, value in zip(names, values, strict=True)}
            self.restart_clock()
        if trainer.global_rank == 0:
            self._report(line | pending.line)
        # with loss scaling, overflows are normal: the scaler skips the step and reduces the scale
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None or bool(
            zero.scaler(trainer.optimizers[0])
        )
        checked = norm if pending.has_norm and not scaled else None
        self._finite.check(module, line["step"], pending.samples, loss, checked)

    def restart_clock(self) -> None:
        """Exclude the time since the last step from the throughput of the next."""
        self._tick = time.perf_counter()

    def sync(self) -> None:
        """Flush all lines to disk, before a training state is saved."""
        if self._file:
            os.fsync(self._file.fileno())
        with self._disk_errors("tensorboard"):
            for dashboard in self._dashboards:
                dashboard.sync()

    def _validates(self, step: int) -> bool:
        """Whether validation is due after this step."""
        every = self.config.val_every
        return schedule.ends_epoch(self.config, step) or (every > 0 and step % every == 0)

    def _report(self, line: dict[str, Any]) -> None:
        step, speed = line["step"], self._speed.add(line["tokens_per_s"])
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        self._add(line)
        decay = schedule.weight_decay(self.config, step - schedule.first_step(self.config) - 1)
        with self._disk_errors(metrics_file.NAME):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        with self._disk_errors("tensorboard"):
            for dashboard in self._dashboards:
                dashboard.log(step, dashboards.metrics_of(line, decay))
        shown = [] if self.curve.val_loss is None else [f"val {self.curve.val_loss:.3f}"]
        for name, short in (("reward_accuracy", "accuracy"), ("reward_margin", "margin")):
            if line.get(name) is not None:
                shown.append(f"{short} {line[name]:.3f}")
        shown += [f"{speed:,.0f} tokens/s", f"lr {line['lr']:.2e}", f"{self._monitor.peak / 1e9:.2f} GB"]
        if self._progress:
            self._progress.step(line["loss"], shown)
        if schedule.ends_epoch(self.config, step):
            self._epoch(step)

    def _epoch(self, step: int) -> None:
        """Write the line of upstream's train_log.txt for the epoch that ends with this step."""
        number = (step - 1) // schedule.steps_per_epoch(self.config)
        mean = self.curve.epoch_mean()
        rate = schedule.learning_rate(self.config, step - schedule.first_step(self.config) - 1)
        since = number - self.config.epoch_begin
        self._log(f"{number} {mean:.6f} {math.exp(min(mean, 700)):.4f} {rate:.8f} {datetime.datetime.now()} {since}\n")

    def plot(self, now: bool = False, required: bool = False) -> None:
        """Draw loss.png (rank 0).

        Args:
            now: draw immediately; otherwise only if the last plot is old enough.
            required: raise errors; otherwise they are printed as warnings.

        Raises:
            UserError: the disk is full (if `required`).
        """
        started = time.monotonic()
        if not now and started < self._next_plot:
            return
        steps = self.curve.last - schedule.first_step(self.config)
        try:
            plot(
                self.curve,
                self._folder.path() / "loss.png",
                f"{self._folder.path().name}: {self.config.trains}, {steps:,} step{'s' * (steps != 1)}",
                choose.of(self.config).UNIT,
            )
        except Exception as error:
            if required:
                raise
            say(f"warning: {self._folder.path() / 'loss.png'} cannot be drawn: {error}")
        drawn = time.monotonic()
        self._next_plot = drawn + max(_PLOT_SECONDS, _PLOT_FACTOR * (drawn - started))

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._close()  # closes the progress bar before the error is printed

    def _close(self) -> None:
        opened = (self._progress, self._file, *self._dashboards)
        self._progress, self._file, self._dashboards = None, None, []
        for writer in filter(None, opened):
            with contextlib.suppress(OSError):  # a full disk was already reported
                writer.close()

    def _log(self, text: str) -> None:
        with (
            self._disk_errors("train_log.txt"),
            open(self._folder.path() / "train_log.txt", "a", encoding="utf-8") as file,
        ):
            file.write(text)

    def _disk_errors(self, name: str) -> contextlib.AbstractContextManager[None]:
        return disk_errors(self._folder.path() / name, "The run then continues from its last state")
