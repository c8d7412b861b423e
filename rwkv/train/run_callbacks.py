"""The callbacks of a run: metrics, checkpoints, samples, report page, signals, memory."""

from dataclasses import dataclass
from pathlib import Path

from rwkv.config import TrainConfig
from rwkv.data.convert import char_level
from rwkv.data.decoding import vocabulary_of
from rwkv.models import RWKV
from rwkv.train.callbacks.best import Best
from rwkv.train.callbacks.checkpointing import Checkpointer, Restorer, saver, write_missing_checkpoints
from rwkv.train.callbacks.memory import MemoryMonitor
from rwkv.train.callbacks.metrics import Metrics
from rwkv.train.callbacks.reference import Reference
from rwkv.train.callbacks.report_page import ReportPage
from rwkv.train.callbacks.sampling import Sampler, prompts
from rwkv.train.callbacks.signals import Signals
from rwkv.train.resume import watched_files
from rwkv.train.resume.run_state import State
from rwkv.train.resume.tracked_folder import TrackedFolder
from rwkv.train.resume.watched_files import WatchedFiles
from rwkv.train.run import Run
from rwkv.train.run_data import RunData
from rwkv.train.runtime.lightning import pl


@dataclass(frozen=True)
class RunCallbacks:
    """The callbacks of a run.

    Attributes:
        all: every callback, in the order in which they are called.
        inputs: the files that the run reads.
    """

    all: list[pl.Callback]
    monitor: MemoryMonitor
    metrics: Metrics
    checkpointer: Checkpointer
    page: ReportPage
    signals: Signals
    inputs: WatchedFiles

    @property
    def best(self) -> Best:
        """The lowest validation loss."""
        return self.checkpointer.best


def make(
    run: Run, tracked: TrackedFolder, model: RWKV, data: RunData, state: State | None, monitor: MemoryMonitor
) -> RunCallbacks:
    """Create the callbacks. Writes checkpoints that were due at the step of `state`, the training
    state to resume from, if they are missing.
    """
    c, manifest = run.flags, data.manifest
    save, best = saver(run, tracked, model, manifest), Best(c, manifest)
    if state:
        write_missing_checkpoints(c, run.folder, state, save, best)
    metrics = Metrics(c, tracked, monitor, data.validation_samples)
    inputs = watched_files.inputs_of(model, manifest)
    checkpointer = Checkpointer(c, tracked, manifest, save, metrics, inputs, best)
    signals = Signals(checkpointer.unsaved)
    vocabulary = vocabulary_of(data.tokens, run.sizes.vocab_size, _characters(c))
    page = ReportPage(
        c, tracked, manifest, metrics, monitor, data.tokens, data.training, data.validation_samples, vocabulary, model
    )
    every = [monitor, Restorer(tracked, state, manifest), metrics, checkpointer, page, signals]
    if c.objective == "dpo":
        every.insert(0, Reference(c, tracked, manifest, data.training, data.validation_samples))
    if c.sample_every:
        source = data.validation_samples.source if data.validation_samples else data.training
        chosen = prompts(c, source.stream, vocabulary)
        every.insert(-2, Sampler(c, tracked, chosen, vocabulary, metrics, checkpointer))
    return RunCallbacks(every, monitor, metrics, checkpointer, page, signals, inputs)


def _characters(c: TrainConfig) -> Path | None:
    """The vocabulary file of character-level data; None for other data."""
    return c.folder / "vocab.json" if c.data_type in char_level.TEXTS else None
