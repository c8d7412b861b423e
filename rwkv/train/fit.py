"""Train a model: a run from its flags to its checkpoints."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv import adapter_files, checkpoint, compat
from rwkv.adapters import lora
from rwkv.commands import command, output
from rwkv.config import TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert import char_level
from rwkv.data.dataset import Samples, ValidationSamples
from rwkv.data.decoding import vocabulary_of
from rwkv.files import sha256
from rwkv.memory import auto, machine
from rwkv.models import RWKV
from rwkv.train import checks, data_source, report, resume_or_start, samples, setup, stages
from rwkv.train.callbacks import best as bests
from rwkv.train.callbacks.best import Best
from rwkv.train.callbacks.checkpointing import (
    FINAL,
    Checkpointer,
    Restorer,
    checkpoint_name,
    write_missing_checkpoints,
)
from rwkv.train.callbacks.memory import MemoryMonitor
from rwkv.train.callbacks.metrics import Metrics
from rwkv.train.callbacks.reference import Reference
from rwkv.train.callbacks.report_page import ReportPage
from rwkv.train.callbacks.sampling import Sampler, prompts
from rwkv.train.callbacks.signals import Signals
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.resolve import resolve
from rwkv.train.resume import run_manifest, state_files
from rwkv.train.resume.run_state import State
from rwkv.train.resume.tracked_folder import TrackedFolder
from rwkv.train.resume.watched_files import WatchedFiles, frozen_in
from rwkv.train.run import Run
from rwkv.train.runtime import cpu, launcher, peers, process, strategy
from rwkv.train.runtime.lightning import pl, rank_zero_only
from rwkv.train.runtime.ranks import Ranks, facts
from rwkv.train.runtime.trainer import make_trainer, quiet_lightning


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


@dataclass(frozen=True)
class _Data:
    """The data of a run, and the run's manifest."""

    tokens: Dataset
    training: Samples
    validation_samples: ValidationSamples | None
    manifest: dict[str, Any]


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
        data = _open(run, model)
        _report_start(run, model, data, monitor)
        state = _begin(run, model, data)
        return _train(run, model, data, state, tracked, ranks, monitor)


def _open(run: Run, model: RWKV) -> _Data:
    """Open the data of a run, and convert it first if necessary."""
    source = data_source.describe(run.flags)
    manifest = run_manifest.describe(run, source) | {"types": report.types(run.flags, model)}
    resume_or_start.check_source(run, manifest)
    tokens = data_source.open_data(run.flags, run.sizes, source)
    validation = data_source.open_validation(run.flags, run.sizes)
    manifest["data"] = run_manifest.data_of(tokens)
    manifest["validation"] = run_manifest.data_of(validation) if validation else None
    return _Data(tokens, *samples.make(run.flags, tokens, validation), manifest)


def _report_start(run: Run, model: RWKV, data: _Data, monitor: MemoryMonitor) -> None:
    report.start(run.flags, model, data.tokens, data.training, data.validation_samples)
    if (limit := auto.available(run.plan)) and monitor.expected() > limit:
        say(
            f"memory: {monitor.expected() / 1e9:.2f} GB per device predicted, but only {limit / 1e9:.2f} GB usable. {auto.advice(run.plan, limit)}"
        )


def _begin(run: Run, model: RWKV, data: _Data) -> State | None:
    """Find the state to resume from, and prepare the folder of a new run."""
    folder, manifest = run.folder, data.manifest
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state, inherited = resume_or_start.find_state(run, manifest, trained)
    manifest.update(inherited)
    if rank_zero_only.rank == 0:
        resume_or_start.delete(run, [x["prefix"] for x in (manifest["data"], manifest["validation"]) if x])
        folder.mkdir(parents=True, exist_ok=True)
        if not run.before:
            run_manifest.write(folder, manifest)
        if run.adapter and not run.base:
            manifest["base"] = setup.write_base(run, model)
            if not run.before:
                run_manifest.write(folder, manifest)
    return state


def _train(
    run: Run,
    model: RWKV,
    data: _Data,
    state: State | None,
    tracked: TrackedFolder,
    ranks: Ranks,
    monitor: MemoryMonitor,
) -> Result:
    c, manifest = run.flags, data.manifest
    save, best, last = _saver(run, tracked, model, manifest), Best(c, manifest), None
    if state:
        write_missing_checkpoints(c, run.folder, state, save, best)
        last = state.step if best.exhausted else None  # --patience has ended the run
    metrics, inputs = Metrics(c, tracked, monitor, data.validation_samples), _watched(model, manifest)
    checkpointer = Checkpointer(c, tracked, manifest, save, metrics, inputs, best)
    signals = Signals(checkpointer.unsaved)
    vocabulary = vocabulary_of(data.tokens, run.sizes.vocab_size, _characters(c))
    page = ReportPage(
        c, tracked, manifest, metrics, monitor, data.tokens, data.training, data.validation_samples, vocabulary, model
    )
    callbacks = [monitor, Restorer(tracked, state, manifest), metrics, checkpointer, page, signals]
    if c.objective == "dpo":
        callbacks.insert(0, Reference(c, tracked, manifest, data.training, data.validation_samples))
    if c.sample_every:
        chosen = prompts(
            c, (data.validation_samples.source if data.validation_samples else data.training).stream, vocabulary
        )
        callbacks.insert(-2, Sampler(c, tracked, chosen, vocabulary, metrics, checkpointer))
    trainer = make_trainer(run, callbacks)
    begin = (state.step, state.samples) if state else None
    module = TrainingModule(model, data.training, c, begin, facts(run, manifest, model), last)
    del state  # frees its memory
    with (
        ranks.passing_flags(),
        peers.children_end_with_this_process(),
        monitor.explain_errors(),
        peers.explain_errors(c.world_size),
        inputs.explain_errors(),
    ):
        compat.fit(trainer, module)
    folder = tracked.path()
    end = schedule.first_step(c) + schedule.total_steps(c)
    if trainer.interrupted:
        say(
            f"stopped in step {module.step + 1:,} without saving. Run the same command to resume from the last state in {state_files.folder_of(folder)}"
        )
        raise KeyboardInterrupt
    early = module.step < end and (best.exhausted or module.end < end)
    if module.step < end and not early:
        if rank_zero_only.rank == 0:
            metrics.plot(now=True)
        page.write("stopped and saved")
        say(
            f"stopped at step {module.step:,} of {end:,} and saved ({folder / checkpointer.last}). Run the same command to continue"
        )
        strategy.leave_process_group()
        signals.exit()
    result = _finish(run, folder, trainer, module, metrics, best, early)
    page.write("stopped early" if early else "complete", best.describe() if early else "")
    say(f"page:  {folder / 'report.html'}")
    if monitor.peak:
        say(f"memory: {monitor.summary()}")
    if not strategy.deepspeed_was_used():
        strategy.leave_process_group()
    return result


def run(flags: TrainConfig) -> None:
    """`fit` for scripts: also destroys the process group afterwards. Raises UserError as `fit`."""
    fit(flags)
    strategy.leave_process_group()


def _characters(c: TrainConfig) -> Path | None:
    """The vocabulary file of character-level data; None for other data."""
    return c.folder / "vocab.json" if c.data_type in char_level.TEXTS else None


def _watched(model: RWKV, manifest: dict[str, Any]) -> WatchedFiles:
    """Watch the files that training reads (on rank 0): base model and data, with their hashes from
    the manifest.
    """
    inputs = WatchedFiles()
    if rank_zero_only.rank == 0:
        if base := manifest["base"]:
            inputs.watch(Path(base["path"]), base["sha256"], sha256, frozen_in(model, base["path"]))
        for data in filter(None, (manifest["data"], manifest["validation"])):
            for path, known in run_manifest.data_files(data):
                inputs.watch(path, known)
    return inputs


def _finish(
    run: Run, folder: Path, trainer: pl.Trainer, module: TrainingModule, metrics: Metrics, best: Best, early: bool
) -> Result:
    """Draw the loss curve, and report the results and possible next commands. `early`: whether
    --patience ended the run.
    """
    c = run.flags
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


def _saver(run: Run, tracked: TrackedFolder, model: RWKV, manifest: dict[str, Any]) -> Callable[..., None]:
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
