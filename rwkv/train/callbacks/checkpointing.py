"""Saving of training states, and of checkpoints under upstream's names; restoring a state."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkv import checkpoint
from rwkv.config import TrainConfig
from rwkv.train.callbacks.metrics import Metrics
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.resume import run_manifest, run_state, state_files
from rwkv.train.resume.home import Home
from rwkv.train.resume.unchanged import Unchanged
from rwkv.train.runtime import zero
from rwkv.train.runtime.lightning import pl

_SHARE = 0.02  # of the time that saving states may take, where --save_every does not say how often
_SECONDS = 10  # the least between two states, likewise


def checkpoint_name(c: TrainConfig, step: int) -> str:
    """The checkpoint that is due after this step (from epoch 0); empty if none is."""
    epoch, inside = divmod(step, schedule.steps_per_epoch(c))
    ends = step == schedule.first_step(c) + schedule.total_steps(c)
    if not inside and ((epoch - 1 - c.epoch_begin) % c.epoch_save == 0 or ends):
        return f"rwkv-{epoch - 1}.pth"
    return "rwkv-final.pth" if ends else ""


def complete(c: TrainConfig, folder: Path, begin: run_state.State, save: Callable[[str, int, Callable], None]) -> None:
    """Write the checkpoint that is due after the step of a state, if it is missing: the run ended before it was written, or it was deleted."""
    name = checkpoint_name(c, begin.step)
    if name and not ((folder / name).exists() and checkpoint.read_manifest(folder / name).get("step") == begin.step):
        save(name, begin.step, lambda names: {one: begin.weights[one] for one in names})
        say(f"{folder / name} was missing; it is written again from the training state of step {begin.step:,}")


class Restorer(pl.Callback):
    """Restores the training state to resume from, then writes the manifest: until then the old one is valid.

    Args:
        begin: the state, on rank 0; None for a new run.
        run: the run's manifest.
    """

    def __init__(self, home: Home, begin: run_state.State | None, run: dict[str, Any]):
        self._home, self._begin, self._run = home, begin, run
        self._continues = begin is not None

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        if trainer.strategy.broadcast(self._continues):
            run_state.restore(trainer, module, self._begin)
        self._begin = None  # frees its memory
        if trainer.global_rank == 0:
            run_manifest.write(self._home.now(), self._run)


class Checkpointer(pl.Callback):
    """Saves training states periodically, rwkv-N.pth after every epoch_save-th epoch and the last, rwkv-final.pth if the run ends or is
    interrupted within an epoch.

    Args:
        run: the run's manifest, which goes into every state.
        save: save(name, step, gather) writes a checkpoint; called on every rank, and gather(names) puts parameters together on rank 0.
        inputs: the files that the run reads; if one was changed, nothing more is saved.

    Attribute `last`: the name of the latest checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        home: Home,
        run: dict[str, Any],
        save: Callable[[str, int, Callable], None],
        metrics: Metrics,
        inputs: Unchanged,
    ):
        self.config, self._home, self._run, self._save, self._metrics, self._inputs = (
            config,
            home,
            run,
            save,
            metrics,
            inputs,
        )
        self._module: TrainingModule | None = None
        self.last = ""

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self._module = module
        self._last = self._saved = module.step
        self._next = module.step + (self.config.save_every or 10)
        self._since = time.perf_counter()

    def unsaved(self) -> int:
        """Steps since the last state, including the current one."""
        return self._module.step + 1 - self._saved if self._module else 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainingModule, outputs, batch, batch_idx: int) -> None:
        c, step = self.config, module.step
        if step == self._last:  # gradients are still being accumulated
            return
        self._last = step
        if checkpoint_name(c, step) or step >= self._next or trainer.should_stop:
            self._metrics.read(trainer, module)  # nothing of a step that went wrong is saved
        name = checkpoint_name(c, step) or ("rwkv-final.pth" if trainer.should_stop else "")
        # A state comes before the checkpoint of its step: from it `complete` writes that of a run that was killed between them.
        if name or step >= self._next:
            started = time.perf_counter()
            self._inputs.check()
            taken = run_state.capture(trainer, module, self._run)
            if trainer.global_rank == 0:
                self._metrics.sync()
                state_files.write(self._home.now(), taken)
                if not self._run.get("state_saved"):
                    self._run["state_saved"] = True
                    run_manifest.write(self._home.now(), self._run)
                self._metrics.picture()
            self._next = step + (c.save_every or self._interval(trainer, step, started))
            self._saved, self._since = step, time.perf_counter()
        if name:
            parameters = dict(module.model.named_parameters())
            self._save(
                name,
                step,
                lambda names: zero.weights(
                    {n: parameters[n] for n in names}, module.trainer.optimizers[0], module.device
                ),
            )
            self.last = name

    def _interval(self, trainer: pl.Trainer, step: int, started: float) -> int:
        """Steps until the next state, so that saving takes a small share of the time; the same on all ranks."""
        a_step = (started - self._since) / max(1, step - self._saved)
        a_save = time.perf_counter() - started
        return trainer.strategy.broadcast(max(1, int(max(a_save / _SHARE, _SECONDS) / max(a_step, 1e-6))))
