"""The end of a run: report results and possible next commands, or why it stopped."""

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rwkv.commands import command, output
from rwkv.train.callbacks import best as bests
from rwkv.train.callbacks.checkpointing import FINAL, checkpoint_name
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.resume import state_files
from rwkv.train.run import Run
from rwkv.train.run_callbacks import RunCallbacks
from rwkv.train.runtime import strategy
from rwkv.train.runtime.lightning import pl, rank_zero_only


@dataclass(frozen=True)
class Result:
    """Result of a run. Losses are in nats per token.

    Attributes:
        checkpoint: the last checkpoint.
        steps: completed optimizer steps.
        first_loss: of the first step, before any update.
        last_loss: mean over the last tenth of the steps.
        val_loss: the last validation loss.
    """

    checkpoint: Path
    steps: int
    first_loss: float
    last_loss: float
    val_loss: float | None = None


def finish(run: Run, folder: Path, trainer: pl.Trainer, module: TrainingModule, callbacks: RunCallbacks) -> Result:
    """Report how the run ended, and write its page.

    Args:
        folder: of the run, which may have been renamed since the start.

    Raises:
        KeyboardInterrupt, SystemExit: a signal stopped the run before its last step.
    """
    end = schedule.first_step(run.flags) + schedule.total_steps(run.flags)
    if trainer.interrupted:
        say(
            f"stopped in step {module.step + 1:,} without saving. Run the same command to resume from the last state in {state_files.folder_of(folder)}"
        )
        raise KeyboardInterrupt
    early = module.step < end and (callbacks.best.exhausted or module.end < end)
    if module.step < end and not early:
        _exit_after_signal(folder, module.step, end, callbacks)
    callbacks.signals.release()
    result = _report(run, folder, trainer, module, callbacks, early)
    callbacks.page.write("stopped early" if early else "complete", callbacks.best.describe() if early else "")
    say(f"page:  {folder / 'report.html'}")
    if callbacks.monitor.peak:
        say(f"memory: {callbacks.monitor.summary()}")
    if not strategy.deepspeed_was_used():
        strategy.leave_process_group()
    return result


def _exit_after_signal(folder: Path, step: int, end: int, callbacks: RunCallbacks) -> NoReturn:
    """Report a run that was stopped and saved before its last step, and exit."""
    callbacks.signals.listen()
    if rank_zero_only.rank == 0:
        callbacks.metrics.plot(now=True)
    callbacks.page.write("stopped and saved")
    say(
        f"stopped at step {step:,} of {end:,} and saved ({folder / callbacks.checkpointer.last}). Run the same command to continue"
    )
    strategy.leave_process_group()
    callbacks.signals.exit()


def _report(
    run: Run, folder: Path, trainer: pl.Trainer, module: TrainingModule, callbacks: RunCallbacks, early: bool
) -> Result:
    """Draw the loss curve, and report the results and possible next commands. `early`: whether
    --patience ended the run.
    """
    c, metrics, best = run.flags, callbacks.metrics, callbacks.best
    steps = module.step - schedule.first_step(c)
    if early:
        say(f"stopped early, after {steps:,} of {schedule.total_steps(c):,} steps: {best.describe()}")
    if not trainer.global_step:
        longer = "--patience" if early else "--epoch_count or --max_steps"
        say(f"already complete ({steps:,} steps); raise {longer} to continue, or use --overwrite to start over")
        if trainer.global_rank == 0:
            metrics.load(module.step)
    if trainer.global_rank == 0:
        metrics.plot(now=True, required=True)
    curve = metrics.curve
    losses = trainer.strategy.broadcast((curve.first_loss, curve.loss.tail(0.1), curve.val_loss))  # rank 0's
    result = Result(folder / (checkpoint_name(c, module.step) or FINAL), steps, *losses)
    validation = "" if result.val_loss is None else f", validation loss {result.val_loss:.3f}"
    say(
        f"done:  loss {result.first_loss:.3f} (first step) → {result.last_loss:.3f} (mean of the last 10%){validation};"
        f" {result.checkpoint}, {folder / 'loss.png'}"
    )
    if c.keep_best and best.step:
        say(f"best:  validation loss {best.loss:.3f} at step {best.step:,}: {folder / bests.NAME}")
    if run.adapter:
        flag = "--lora" if c.trains == "LoRA" else "--state"
        say(f"merge: {command('merge', '--adapter', result.checkpoint, '--output', output('merged.pth'))}")
        say(f"chat:  {command('generate', '--model', run.base_path, flag, result.checkpoint)}")
    return result
