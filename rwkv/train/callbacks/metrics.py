"""Records every step: metrics.jsonl, train_log.txt, progress, dashboards, loss.png."""

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
from rwkv.files import full_disk
from rwkv.train.callbacks import dashboards
from rwkv.train.callbacks.curve import Curve
from rwkv.train.callbacks.memory import MemoryMonitor
from rwkv.train.callbacks.nonfinite import NonFiniteGuard
from rwkv.train.callbacks.plot import plot
from rwkv.train.callbacks.progress import Progress
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.loop.validation import held_out_loss
from rwkv.train.resume import metrics_file
from rwkv.train.resume.home import Home
from rwkv.train.runtime import strategy, zero
from rwkv.train.runtime.lightning import pl

_PICTURE = (60, 50)  # seconds between two pictures of a run, at least; and as many times as long as one takes to draw


def waits_one_step(device: torch.device) -> bool:
    """Whether the numbers of a step are read after the next step has been launched."""
    return device.type == "cuda"


class PendingScalars:
    """Scalars that are copied from a device asynchronously."""

    def __init__(self, numbers: torch.Tensor):
        self._numbers, self._arrived = numbers.to("cpu", non_blocking=True), None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """Wait for the copy, and return the values."""
        if self._arrived:
            self._arrived.synchronize()
        return self._numbers.tolist()


@dataclass(frozen=True)
class _Step:
    line: dict[str, Any]  # of metrics.jsonl, as far as it needs no number of the device
    samples: int  # with this step, over all ranks
    has_norm: bool
    numbers: PendingScalars


class Metrics(pl.Callback):
    """One line per optimizer step in metrics.jsonl, the progress, upstream's train_log.txt, dashboards if asked for, and loss.png.

    Steps count from epoch 0; a run that is resumed appends to its lines, and lines of later steps are dropped. What is kept in memory, and what a
    step costs, does not depend on how many there were.

    Attributes:
        curve: what all lines add up to, those before this start included (on rank 0).
    """

    def __init__(
        self, config: TrainConfig, home: Home, watch: MemoryMonitor, held_out: ValidationSamples | None = None
    ):
        self._watch = watch
        self.config, self._home, self._held_out = config, home, held_out
        self.curve = Curve()
        self._batches: list[torch.Tensor] = []
        self._finite = NonFiniteGuard(config, home)
        self._unread: list[_Step] = []
        self._progress: Progress | None = None
        self._file: Any = None
        self._dashboards: list[dashboards.Dashboard] = []
        self._next_picture = time.monotonic() + _PICTURE[0]

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self._tick, self._last = time.perf_counter(), module.step
        first = schedule.first_step(self.config)
        if trainer.global_rank == 0:
            self.load(module.step)
            with self._told_if_full(metrics_file.NAME):
                self._file = open(self._home.now() / metrics_file.NAME, "a", encoding="utf-8")  # noqa: SIM115, open for the length of the run
            if module.step == first:
                self._log(f"NEW RUN {datetime.datetime.now():%Y-%m-%d-%H-%M-%S}\n{vars(self.config)}\n")
            with self._told_if_full("tensorboard"):
                self._dashboards = dashboards.make(self.config, self._home.now(), module.step)
        self._progress = Progress(schedule.total_steps(self.config), module.step - first, quiet=trainer.global_rank > 0)

    def load(self, last: int) -> None:
        """Read what an earlier start has recorded up to step `last`; what was recorded of later steps is dropped."""
        self.curve = Curve()
        with self._told_if_full(metrics_file.NAME):
            metrics_file.keep_steps(
                self._home.now() / metrics_file.NAME, last, schedule.first_step(self.config), self._add
            )

    def _add(self, line: dict[str, Any]) -> None:
        self.curve.add(line, (line["step"] - 1) // schedule.steps_per_epoch(self.config))

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainingModule, outputs, batch, batch_idx: int) -> None:
        counted = module.loss.new_zeros(()) if module.data.plain else module.targets
        self._batches.append(torch.stack([module.loss.double(), counted.double()]))
        if module.step == self._last:  # gradients are still being accumulated
            return
        self._last = module.step
        batches, self._batches = torch.stack(self._batches), []
        mean = batches[:, 0].mean()
        # The numbers of a step that ranks wait for each other with; a stop that one of them was asked for rides along.
        norm = mean.new_full((), math.nan) if module.grad_norm is None else module.grad_norm.to(mean)
        numbers = torch.stack([mean, mean.new_full((), module.stop), norm, batches[:, 1].sum()])
        group = trainer.optimizers[0].param_groups[0]
        line = {
            "step": module.step,
            "lr": group["lr"] / group["lr_scale"],
            "tokens": module.samples * self.config.ctx_len,
            "tokens_per_s": round(schedule.tokens_per_step(self.config) / (time.perf_counter() - self._tick), 1),
            **self._watch.line(),
        }
        self._tick = time.perf_counter()
        self._unread.append(
            _Step(line, module.samples, module.grad_norm is not None, PendingScalars(strategy.mean(numbers)))
        )
        if (
            not waits_one_step(module.device)
            or schedule.ends_epoch(self.config, module.step)
            or self._validates(module.step)
        ):
            self.read(trainer, module)
        elif len(self._unread) > 1:
            self._read(trainer, module, self._unread.pop(0))

    def read(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Read what has not been read yet: on a GPU a step's numbers are read after the next one is launched, so that it never waits for work.

        Raises:
            UserError: one of them is NaN or Inf (NonFiniteGuard). What is saved has been read before.
        """
        while self._unread:
            self._read(trainer, module, self._unread.pop(0))

    def _read(self, trainer: pl.Trainer, module: TrainingModule, made: "_Step") -> None:
        loss, stop, norm, targets = made.numbers.read()
        trainer.should_stop = stop > 0
        line: dict[str, Any] = {"step": made.line["step"], "loss": loss} | (
            {"grad_norm": norm} if made.has_norm else {}
        )
        if not module.data.plain:
            line["targets"] = round(targets)
        if self._held_out is not None and math.isfinite(loss) and self._validates(line["step"]):
            line["val_loss"] = held_out_loss(module, self._held_out, self.config.micro_bsz)
            self._tick = time.perf_counter()
        if trainer.global_rank == 0:
            self._report(line | made.line)
        # In fp16 a gradient beyond the range is usual: the scaler then skips the step and takes a smaller scale.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None or bool(
            zero.scaler(trainer.optimizers[0])
        )
        self._finite.check(module, line["step"], made.samples, loss, norm if made.has_norm and not scaled else None)

    def sync(self) -> None:
        """Bring the lines to disk: a state that is saved must not be ahead of them."""
        if self._file:
            os.fsync(self._file.fileno())
        with self._told_if_full("tensorboard"):
            for dashboard in self._dashboards:
                dashboard.sync()

    def _validates(self, step: int) -> bool:
        """Whether the held-out loss is due after this step."""
        every = self.config.val_every
        return schedule.ends_epoch(self.config, step) or (every > 0 and step % every == 0)

    def _report(self, line: dict[str, Any]) -> None:
        step, speed = line["step"], line["tokens_per_s"]
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        self._add(line)
        decay = schedule.weight_decay(self.config, step - schedule.first_step(self.config) - 1)
        with self._told_if_full(metrics_file.NAME):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        with self._told_if_full("tensorboard"):
            for dashboard in self._dashboards:
                dashboard.log(step, dashboards.figures(line, decay))
        figures = [] if self.curve.val_loss is None else [f"val {self.curve.val_loss:.3f}"]
        figures += [f"{speed:,.0f} tokens/s", f"lr {line['lr']:.2e}", f"{self._watch.peak / 1e9:.2f} GB"]
        if self._progress:
            self._progress.step(line["loss"], figures)
        if schedule.ends_epoch(self.config, step):
            self._epoch(step)

    def _epoch(self, step: int) -> None:
        """Upstream's line for the epoch that ends with this step."""
        number = (step - 1) // schedule.steps_per_epoch(self.config)
        mean = self.curve.epoch_mean()
        rate = schedule.learning_rate(self.config, step - schedule.first_step(self.config) - 1)
        since = number - self.config.epoch_begin
        self._log(f"{number} {mean:.6f} {math.exp(min(mean, 700)):.4f} {rate:.8f} {datetime.datetime.now()} {since}\n")

    def picture(self, now: bool = False, must: bool = False) -> None:
        """Draw loss.png (rank 0): `now`, or, during a run, so rarely that it takes a small share of the time.

        Raises:
            UserError: the disk is full, if it `must` be drawn; else a picture that cannot be drawn is a warning.
        """
        started = time.monotonic()
        if not now and started < self._next_picture:
            return
        what = "LoRA" if getattr(self.config, "lora", False) else "all weights"
        steps = self.curve.last - schedule.first_step(self.config)
        try:
            plot(
                self.curve,
                self._home.now() / "loss.png",
                f"{self._home.now().name}: {what}, {steps:,} step{'s' * (steps != 1)}",
            )
        except Exception as error:
            if must:
                raise
            say(f"warning: {self._home.now() / 'loss.png'} cannot be drawn: {error}")
        drawn = time.monotonic()
        self._next_picture = drawn + max(_PICTURE[0], _PICTURE[1] * (drawn - started))

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._close()  # before the error is told: the bar would be drawn over it

    def _close(self) -> None:
        opened, self._progress, self._file, self._dashboards = (
            (self._progress, self._file, *self._dashboards),
            None,
            None,
            [],
        )
        for one in filter(None, opened):
            with contextlib.suppress(OSError):  # what a full disk left in the buffer has been told of
                one.close()

    def _log(self, text: str) -> None:
        with (
            self._told_if_full("train_log.txt"),
            open(self._home.now() / "train_log.txt", "a", encoding="utf-8") as file,
        ):
            file.write(text)

    def _told_if_full(self, name: str) -> contextlib.AbstractContextManager[None]:
        return full_disk(self._home.now() / name, "The run then continues from its last state")
