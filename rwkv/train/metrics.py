"""What a run leaves behind of every step: metrics, progress bar, logs."""

import contextlib
import datetime
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rwkv.config import TrainConfig
from rwkv.data.dataset import HeldOut
from rwkv.files import full_disk, whole
from rwkv.train import dashboards, schedule, strategy
from rwkv.train.finite import Finite
from rwkv.train.lightning import pl
from rwkv.train.module import TrainingModule
from rwkv.train.validation import held_out_loss
from rwkv.train.watch import Watch


def waits_one_step(device: torch.device) -> bool:
    """Whether a step's numbers are read after the next one."""
    return device.type == "cuda"


class Late:
    """Numbers on their way from a device; asking for them does not hold up what was launched since."""

    def __init__(self, numbers: torch.Tensor):
        self._numbers, self._arrived = numbers.to("cpu", non_blocking=True), None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """Wait until they are there."""
        if self._arrived:
            self._arrived.synchronize()
        return self._numbers.tolist()


@dataclass(frozen=True)
class _Step:
    line: dict[str, Any]  # of metrics.jsonl, as far as it needs no number of the device
    samples: int  # with this step, over all ranks
    has_norm: bool
    numbers: Late


class Metrics(pl.Callback):
    """One line per optimizer step in metrics.jsonl, the progress bar, upstream's train_log.txt, dashboards if asked for.

    Steps count from epoch 0; a run that goes on adds to the lines it has, and lines of later steps are dropped.

    Attributes:
        lines: of metrics.jsonl, those of before included (on rank 0).
    """

    def __init__(self, config: TrainConfig, folder: Path, watch: Watch, held_out: HeldOut | None = None):
        self._watch = watch
        self.config, self.folder, self._held_out = config, folder, held_out
        self.lines: list[dict[str, Any]] = []
        self._batches: list[torch.Tensor] = []
        self._finite = Finite(config, folder)
        self._unread: list[_Step] = []
        self._bar: Any = None
        self._file: Any = None
        self._dashboards: list[dashboards.Dashboard] = []

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self._tick, self._last = time.perf_counter(), module.step
        first = schedule.first_step(self.config)
        self._bar = tqdm(
            total=schedule.total_steps(self.config),
            initial=module.step - first,
            unit="step",
            desc="train",
            mininterval=0.5 if sys.stderr.isatty() else 15,
            disable=trainer.global_rank > 0,
        )
        if trainer.global_rank == 0:
            self.lines = keep_steps(self.folder / "metrics.jsonl", module.step)
            self._file = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, open for the length of the run
            if module.step == first:
                self._log(f"NEW RUN {datetime.datetime.now():%Y-%m-%d-%H-%M-%S}\n{vars(self.config)}\n")
            with self._told_if_full("tensorboard"):
                self._dashboards = dashboards.make(self.config, self.folder, module.step)

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
        self._unread.append(_Step(line, module.samples, module.grad_norm is not None, Late(strategy.mean(numbers))))
        if not waits_one_step(module.device) or schedule.ends_epoch(self.config, module.step) or self._validates(module.step):
            self.read(trainer, module)
        elif len(self._unread) > 1:
            self._read(trainer, module, self._unread.pop(0))

    def read(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Read what has not been read yet: on a GPU a step's numbers are read after the next one is launched, so that it never waits for work.

        Raises:
            UserError: one of them is no number (Finite). What is saved has been read before.
        """
        while self._unread:
            self._read(trainer, module, self._unread.pop(0))

    def _read(self, trainer: pl.Trainer, module: TrainingModule, made: "_Step") -> None:
        loss, stop, norm, targets = made.numbers.read()
        trainer.should_stop = stop > 0
        line: dict[str, Any] = {"step": made.line["step"], "loss": loss} | ({"grad_norm": norm} if made.has_norm else {})
        if not module.data.plain:
            line["targets"] = round(targets)
        if self._held_out is not None and math.isfinite(loss) and self._validates(line["step"]):
            line["val_loss"] = held_out_loss(module, self._held_out, self.config.micro_bsz)
            self._tick = time.perf_counter()
        if trainer.global_rank == 0:
            self._report(line | made.line)
        # In fp16 a gradient beyond the range is usual: the scaler then skips the step and takes a smaller scale.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
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
        step, loss, speed = line["step"], line["loss"], line["tokens_per_s"]
        line = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()}
        self.lines.append(line)
        decay = schedule.weight_decay(self.config, step - schedule.first_step(self.config) - 1)
        with self._told_if_full("metrics.jsonl"):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        with self._told_if_full("tensorboard"):
            for dashboard in self._dashboards:
                dashboard.log(step, dashboards.figures(line, decay))
        held_out = next((f", held out {old['val_loss']:.3f}" for old in reversed(self.lines) if old.get("val_loss") is not None), "")
        self._bar.set_postfix_str(
            f"loss {loss:.3f}{held_out}, lr {line['lr']:.2e}, {speed:,.0f} tokens/s, {self._watch.peak / 1e9:.2f} GB", refresh=False
        )
        self._bar.update()
        if schedule.ends_epoch(self.config, step):
            self._epoch(step)

    def _epoch(self, step: int) -> None:
        """Upstream's line for the epoch that ends with this step."""
        number = (step - 1) // schedule.steps_per_epoch(self.config)
        begins = number * schedule.steps_per_epoch(self.config)
        losses = [line["loss"] if line["loss"] is not None else math.nan for line in self.lines if line["step"] > begins]
        mean = sum(losses) / len(losses)
        rate = schedule.learning_rate(self.config, step - schedule.first_step(self.config) - 1)
        since = number - self.config.epoch_begin
        self._log(f"{number} {mean:.6f} {math.exp(min(mean, 700)):.4f} {rate:.8f} {datetime.datetime.now()} {since}\n")

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._close()  # before the error is told: the bar would be drawn over it

    def _close(self) -> None:
        opened, self._bar, self._file, self._dashboards = (self._bar, self._file, *self._dashboards), None, None, []
        for one in filter(None, opened):
            with contextlib.suppress(OSError):  # what a full disk left in the buffer has been told of
                one.close()

    def _log(self, text: str) -> None:
        with self._told_if_full("train_log.txt"), open(self.folder / "train_log.txt", "a", encoding="utf-8") as file:
            file.write(text)

    def _told_if_full(self, name: str) -> contextlib.AbstractContextManager[None]:
        return full_disk(self.folder / name, "The run then goes on from its last state")


def keep_steps(metrics: Path, last: int) -> list[dict[str, Any]]:
    """The lines up to step `last`; later ones are dropped from the file, so that each step stands there once."""
    if not metrics.exists():
        return []
    # A line without its end is what a crash or a full disk leaves.
    ended = [line for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in ended if json.loads(line)["step"] <= last]
    with whole(metrics) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return [json.loads(line) for line in kept]
