"""Write report.html at the start of a run, during it and at its end."""

import dataclasses
import time
from typing import Any

import torch

from rwkv.commands import command
from rwkv.config import DPOConfig, LoRAConfig, StateConfig, TrainConfig
from rwkv.data import provenance
from rwkv.data.binidx import Dataset
from rwkv.data.dataset import Samples, ValidationSamples
from rwkv.data.decoding import Example, Vocabulary, example
from rwkv.files import atomic_write
from rwkv.memory import auto
from rwkv.models import RWKV
from rwkv.train.callbacks import sampling
from rwkv.train.callbacks.memory import MemoryMonitor
from rwkv.train.callbacks.metrics import Metrics
from rwkv.train.callbacks.page.document import Facts, render
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.objectives import choose
from rwkv.train.resume.tracked_folder import TrackedFolder
from rwkv.train.run import STAGE_FLAGS
from rwkv.train.runtime.lightning import pl, rank_zero_only
from rwkv.train.runtime.strategy import shape

NAME = "report.html"
# minimum interval between two pages: in seconds, and relative to the time of writing one
_SECONDS, _FACTOR = 30, 50
_EXAMPLES, _TOKENS = 3, 400  # number of examples, and tokens of each that are shown
# flags of the command that repeats a run: these say how it was started, not what it computes
_NOT_REPEATED = {"overwrite", "allow_changes", "auto"}
_SIZES = ("version", "n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "pre_ffn", "head_size")


class ReportPage(pl.Callback):
    """Writes the page on rank 0. An error of writing it is a warning, and does not end the run.

    Args:
        manifest: of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        tracked: TrackedFolder,
        manifest: dict[str, Any],
        metrics: Metrics,
        monitor: MemoryMonitor,
        data: Dataset,
        training: Samples,
        validation_samples: ValidationSamples | None,
        vocabulary: Vocabulary,
        model: RWKV,
    ):
        self.config, self._folder, self._manifest = config, tracked, manifest
        self._metrics, self._monitor, self._vocabulary = metrics, monitor, vocabulary
        self._training, self._step = training, schedule.first_step(config)
        self._next, self._started = 0.0, False
        self._examples: list[Example] | None = None
        self._data = _about_data(data, training, validation_samples, vocabulary)
        self._size = _about_model(model)

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self._step, self._started = module.step, True
        self.write("running")

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainingModule, *_) -> None:
        self._step = module.step
        if time.monotonic() >= self._next:
            self.write("running")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        # a start that fails, such as one that cannot restore its state, changes nothing
        if self._started and not isinstance(exception, KeyboardInterrupt):
            self.write("failed", str(exception) or type(exception).__name__)

    @rank_zero_only
    def write(self, status: str, message: str = "") -> None:
        """Write the page. Arguments as in `Facts`."""
        started = time.monotonic()
        try:
            path = self._folder.path() / NAME
            page = render(self._facts(status, message))
            with atomic_write(path) as temporary:
                temporary.write_text(page, encoding="utf-8", errors="replace")
        except Exception as error:
            say(f"warning: {NAME} cannot be written: {error}")
        done = time.monotonic()
        self._next = done + max(_SECONDS, _FACTOR * (done - started))

    def _facts(self, status: str, message: str) -> Facts:
        c, folder, monitor = self.config, self._folder.path(), self._monitor
        if self._examples is None:  # not before: rank 0's seed is final when training starts
            first = schedule.first_sample(c)
            windows = [window for i in range(_EXAMPLES) for window in self._training.sequences(first + i)]
            self._examples = [example(self._training, window, self._vocabulary, _TOKENS) for window in windows]
        offset = monitor.expected() - monitor.predicted.total
        parts = dict(monitor.predicted.device)
        parts["process"] = parts.get("process", 0) + offset
        phases = monitor.predicted.phases
        first_step = schedule.first_step(c)
        return Facts(
            title=folder.resolve().name,
            subtitle=f"{f'{c.trains}, ' if c.adapter else ''}RWKV-{c.version}, {dict(self._size)['model']}",
            status=status,
            message=message,
            step=max(self._step, self._metrics.curve.last),
            first=first_step,
            last=first_step + schedule.total_steps(c),
            curve=self._metrics.curve,
            predicted={name: size for name, size in parts.items() if size > 0},
            phases=[(name, size + offset, monitor.peaks.get(name, 0)) for name, size in phases.items()],
            available=auto.available(monitor.plan),
            data=self._data,
            examples=self._examples,
            samples=sampling.read(folder / sampling.NAME),
            command=repeat(c),
            manifest=self._manifest,
            size=self._size,
            refresh=_SECONDS if status == "running" else 0,
            unit=choose.of(c).UNIT,
            time=time.time(),
            updated=time.strftime("%Y-%m-%d %H:%M:%S"),
        )


def repeat(c: TrainConfig) -> str:
    """The command that repeats a run with these resolved flags, in an empty folder."""
    job = (
        "dpo"
        if isinstance(c, DPOConfig)
        else "lora"
        if isinstance(c, LoRAConfig)
        else "state"
        if isinstance(c, StateConfig)
        else "finetune"
        if c.load_model
        else "pretrain"
    )
    omitted = _NOT_REPEATED | set(_SIZES if c.load_model else ()) | set(STAGE_FLAGS if c.my_pile_stage else ())
    words = []
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        automatic = (field.name, value) == ("cuda_graph", "off")
        if field.name not in omitted and value != field.default and not automatic:
            words += [f"--{field.name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return command(job, *words)


def _about_data(
    data: Dataset, training: Samples, validation_samples: ValidationSamples | None, vocabulary: Vocabulary
) -> list[tuple[str, str]]:
    found = provenance.read(data.prefix)
    names = ", ".join(source["path"] for source in (found or {}).get("sources", [])[:5])
    return [
        ("source", f"{data.prefix}" + (f" ({names})" if names else "")),
        ("documents", f"{len(data):,}"),
        ("tokens", f"{len(training.stream):,}"),
        ("validation tokens", f"{len(validation_samples.source.stream):,}" if validation_samples else ""),
        ("tokenizer", vocabulary.name),
    ]


def _about_model(model: RWKV) -> list[tuple[str, str]]:
    s, counts = model.sizes, [(torch.Size(shape(p)).numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(count for count, _ in counts), sum(count for count, trains in counts if trains)
    return [
        ("model", f"L{s.n_layer} D{s.n_embd} V{s.vocab_size}"),
        ("parameters", f"{total:,}"),
        ("trained", f"{trained:,} ({trained / total:.2%})"),
    ]
