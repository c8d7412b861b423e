"""Train a model: a run from its flags to its checkpoints."""

import math

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.memory import auto, machine
from rwkv.models import RWKV
from rwkv.train import checks, report, resume_or_start, run_callbacks, setup, stages
from rwkv.train.callbacks.memory import MemoryMonitor
from rwkv.train.console import say
from rwkv.train.finish import Result, finish
from rwkv.train.loop.module import TrainingModule
from rwkv.train.resolve import resolve
from rwkv.train.resume.run_state import State
from rwkv.train.resume.tracked_folder import TrackedFolder
from rwkv.train.run import Run
from rwkv.train.run_callbacks import RunCallbacks
from rwkv.train.run_data import RunData, open_data
from rwkv.train.runtime import cpu, launcher, peers, process, strategy
from rwkv.train.runtime.lightning import pl
from rwkv.train.runtime.ranks import Ranks, facts
from rwkv.train.runtime.trainer import make_trainer, quiet_lightning


@process.restored()
def fit(flags: TrainConfig) -> Result:
    """Train a model. All inputs are validated before the first step, and the run's folder is locked
    until this returns.

    Raises:
        UserError: invalid data, checkpoint, adapter or flags; the folder cannot be used, or is used
            by another process.
    """
    checks.check_numbers(flags)
    launcher.check(flags)
    peers.end_with_parent()
    with resume_or_start.locked(flags.folder), TrackedFolder(flags.folder) as tracked:
        quiet_lightning()
        ranks = Ranks()
        run = resolve(flags, ranks)
        cpu.prepare()
        if run.flags.my_pile_stage == 1:
            return Result(stages.write_initial(run), 0, math.nan, math.nan)
        resting = machine.rss()
        model = setup.build(run)
        monitor = MemoryMonitor(run.plan, resting)
        data = open_data(run, model)
        _report_start(run, model, data, monitor)
        state = resume_or_start.begin(run, model, data.manifest)
        callbacks = run_callbacks.make(run, tracked, model, data, state, monitor)
        c = run.flags
        with ranks.passing_flags(), peers.started(c.devices, c.num_nodes), peers.explain_errors(c.world_size):
            trainer, module = _train(run, model, data, state, callbacks)
            return finish(run, tracked.path(), trainer, module, callbacks)


def _report_start(run: Run, model: RWKV, data: RunData, monitor: MemoryMonitor) -> None:
    report.start(run.flags, model, data.tokens, data.training, data.validation_samples)
    if (limit := auto.available(run.plan)) and monitor.expected() > limit:
        say(
            f"memory: {monitor.expected() / 1e9:.2f} GB per device predicted, but only {limit / 1e9:.2f} GB usable. {auto.advice(run.plan, limit)}"
        )


def _train(
    run: Run, model: RWKV, data: RunData, state: State | None, callbacks: RunCallbacks
) -> tuple[pl.Trainer, TrainingModule]:
    """Train from `state`, or from the start, to the last step or until the run is stopped."""
    begin = (state.step, state.samples) if state else None
    last = state.step if state and callbacks.best.exhausted else None  # --patience has ended the run
    trainer = make_trainer(run, callbacks.all)
    module = TrainingModule(model, data.training, run.flags, begin, facts(run, data.manifest, model), last)
    with callbacks.monitor.explain_errors(), callbacks.inputs.explain_errors():
        try:
            compat.fit(trainer, module)
        except BaseException:
            callbacks.signals.release()
            raise
    return trainer, module


def run(flags: TrainConfig) -> None:
    """`fit` for scripts: also destroys the process group afterwards. Raises UserError as `fit`."""
    fit(flags)
    strategy.leave_process_group()
