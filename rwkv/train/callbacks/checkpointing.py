"""Save training states, and checkpoints under upstream's names or as the best; restore states."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv import adapter_files, checkpoint
from rwkv.adapters import lora
from rwkv.config import TrainConfig
from rwkv.models import RWKV
from rwkv.train import setup
from rwkv.train.callbacks import best as bests
from rwkv.train.callbacks.best import Best
from rwkv.train.callbacks.metrics import Metrics
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.resume import run_manifest, run_state, state_files
from rwkv.train.resume.tracked_folder import TrackedFolder
from rwkv.train.resume.watched_files import WatchedFiles
from rwkv.train.run import Run
from rwkv.train.runtime import zero
from rwkv.train.runtime.lightning import pl, rank_zero_only

# Without --save_every: the maximum fraction of time spent on saving states, and the minimum
# interval between states in seconds.
_MAX_SAVE_SHARE = 0.02
_MIN_INTERVAL = 10
FINAL = "rwkv-final.pth"  # of a run that ends within an epoch


def checkpoint_name(c: TrainConfig, step: int) -> str:
    """File name of the checkpoint that is due after this step (counted from epoch 0); empty if none
    is.
    """
    epoch, inside = divmod(step, schedule.steps_per_epoch(c))
    ends = step == schedule.first_step(c) + schedule.total_steps(c)
    if not inside and ((epoch - 1 - c.epoch_begin) % c.epoch_save == 0 or ends):
        return f"rwkv-{epoch - 1}.pth"
    return FINAL if ends else ""


def write_missing_checkpoints(
    c: TrainConfig, folder: Path, begin: run_state.State, save: Callable[..., None], best: Best
) -> None:
    """Write the checkpoints that were due at the step of a training state, if they are missing
    (deleted, or the run was killed before writing them).
    """
    due: dict[str, dict[str, Any]] = {checkpoint_name(c, begin.step) or (FINAL if best.exhausted else ""): {}}
    if c.keep_best and best.step == begin.step:
        due[bests.NAME] = best.entries(best.loss)
    for name, entries in due.items():
        path = folder / name
        if name and not (path.exists() and checkpoint.read_manifest(path).get("step") == begin.step):
            save(name, begin.step, lambda names: {key: begin.weights[key] for key in names}, entries)
            say(f"{path} was missing; written from the training state of step {begin.step:,}")


def saver(run: Run, tracked: TrackedFolder, model: RWKV, manifest: dict[str, Any]) -> Callable[..., None]:
    """A function that saves a checkpoint of the adapter, or of the model if there is no adapter;
    see Checkpointer. Called on all ranks; rank 0 writes.
    """
    fixed = {
        "tokenizer": "World" if model.sizes.vocab_size == 65536 else None,
        "data": manifest["data"]["prefix"],
        "data_sha256": manifest["data"]["sha256"],
        "flags": manifest["flags"],
    }

    def save(
        name: str, step: int, gather: Callable[[Iterable[str]], dict[str, Tensor]], entries: dict[str, Any]
    ) -> None:
        named = dict(model.named_parameters())
        weights = gather(lora.adapter_names(model, lora.parts_in(run.adapter.lora_parts)) if run.adapter else named)
        if rank_zero_only.rank > 0:
            return
        described = {"step": step, **fixed, **entries}
        if run.adapter:
            adapter = setup.adapter_entries(run.adapter, manifest["base"])
            adapter_files.save_adapter(tracked.path() / name, model, adapter, described, weights)
        else:
            checkpoint.save_model(tracked.path() / name, model, described, weights)

    return save


class Restorer(pl.Callback):
    """Restores the training state to resume from; then writes the manifest, which would otherwise
    not match the state on disk.

    Args:
        begin: the state, on rank 0; None for a new run.
        run: the run's manifest.
    """

    def __init__(self, tracked: TrackedFolder, begin: run_state.State | None, run: dict[str, Any]):
        self._folder, self._begin, self._run = tracked, begin, run
        self._continues = begin is not None

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        if trainer.strategy.broadcast(self._continues):
            run_state.restore(trainer, module, self._begin)
        self._begin = None  # frees its memory
        if trainer.global_rank == 0:
            run_manifest.write(self._folder.path(), self._run)


class Checkpointer(pl.Callback):
    """Saves training states periodically, rwkv-N.pth after every epoch_save-th and the last epoch,
    rwkv-final.pth if the run ends or is interrupted within an epoch, and rwkv-best.pth. Ends the
    run if --patience is exhausted.

    Args:
        run: the run's manifest, saved with every state.
        save: save(name, step, gather, entries) writes a checkpoint with additional entries in its
            manifest; called on every rank. gather(names) returns full parameters on rank 0.
        inputs: the files that the run reads; if one was changed, nothing more is saved.

    Attributes:
        last: the name of the latest checkpoint, not counting the best.
        best: the lowest validation loss.
    """

    def __init__(
        self,
        config: TrainConfig,
        tracked: TrackedFolder,
        run: dict[str, Any],
        save: Callable[..., None],
        metrics: Metrics,
        inputs: WatchedFiles,
        best: Best,
    ):
        self.config, self._folder, self._run, self.best = config, tracked, run, best
        self._save, self._metrics, self._inputs = save, metrics, inputs
        self._module: TrainingModule | None = None
        self.last = ""

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self._module = module
        self._last = self._saved = module.step
        self._next = module.step + (self.config.save_every or 10)
        self._since = time.perf_counter()
        if trainer.global_rank == 0:
            self.best.find_kept(self._folder.path())
        self.best.set_values(trainer.strategy.broadcast(self.best.values()))

    def on_train_batch_start(self, *_) -> None:
        self._inputs.check_sizes()

    def unsaved(self) -> int:
        """Steps since the last state, including the current one."""
        return self._module.step + 1 - self._saved if self._module else 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainingModule, outputs, batch, batch_idx: int) -> None:
        c, step = self.config, module.step
        if step == self._last:  # gradients are still being accumulated
            return
        self._last = step
        self._add_validation(trainer, module)
        if checkpoint_name(c, step) or step >= self._next or trainer.should_stop:
            self._metrics.read(trainer, module)  # raises if the step must not be saved
        name = checkpoint_name(c, step) or (FINAL if trainer.should_stop else "")
        # save the state first: if the run is killed before saving the checkpoint,
        # `write_missing_checkpoints` writes it on resume
        if name or step >= self._next:
            started = time.perf_counter()
            self._inputs.check()
            self._run["best"] = self.best.entry()
            state = run_state.capture(trainer, module, self._run)
            if trainer.global_rank == 0:
                self._metrics.sync()
                state_files.write(self._folder.path(), state)
                if not self._run.get("state_saved"):
                    self._run["state_saved"] = True
                    run_manifest.write(self._folder.path(), self._run)
                self._metrics.plot()
            self._next = step + (c.save_every or self._interval(trainer, step, started))
            self._saved, self._since = step, time.perf_counter()
        if name:
            self._write(name, module, {})
            self.last = name

    def _add_validation(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Compare the validation loss of this step, if there is one, with the lowest."""
        if self._metrics.validated != module.step:
            return
        loss = self._metrics.val_loss
        if self.best.add(module.step, loss):
            self._inputs.check()
            self._write(bests.NAME, module, self.best.entries(loss))
        if self.best.exhausted:
            trainer.should_stop = True

    def _write(self, name: str, module: TrainingModule, entries: dict[str, Any]) -> None:
        parameters, optimizer = dict(module.model.named_parameters()), module.trainer.optimizers[0]
        self._save(
            name,
            module.step,
            lambda names: zero.weights({n: parameters[n] for n in names}, optimizer, module.device),
            entries,
        )

    def _interval(self, trainer: pl.Trainer, step: int, started: float) -> int:
        """Steps until the next state, such that saving takes at most _MAX_SAVE_SHARE of the time;
        the same on all ranks.
        """
        per_step = (started - self._since) / max(1, step - self._saved)
        saving = time.perf_counter() - started
        return trainer.strategy.broadcast(
            max(1, int(max(saving / _MAX_SAVE_SHARE, _MIN_INTERVAL) / max(per_step, 1e-6)))
        )
