"""What a run tells its user: what it starts with, in plain words."""

import contextlib
import math
import os
import sys
from typing import Any, TextIO

from tqdm import tqdm

from rwkv.config import TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.data.dataset import Contexts, Documents, HeldOut, Samples
from rwkv.model import RWKV
from rwkv.train import schedule, strategy
from rwkv.train.lightning import rank_zero_only
from rwkv.train.trainer import precision_of


class Unfailing:
    """A text stream whose reader may go away, as a closed terminal or `head` does: what is written then is lost, and the run continues."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> int:
        """As the stream's."""
        with self._without_errors():
            return self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream's."""
        with self._without_errors():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @contextlib.contextmanager
    def _without_errors(self):
        try:
            yield
        except OSError:
            silence(self._file.fileno())


def silence(descriptor: int) -> None:
    """Send what is written to this file descriptor to /dev/null from now on."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


@rank_zero_only
def say(text: str) -> None:
    """Print a line, above a progress bar, on the first process of a run alone. A reader that has gone away does not matter."""
    with tqdm.external_write_mode(file=sys.stdout, nolock=True):
        print(text, file=Unfailing(sys.stdout), flush=True)


def duration(seconds: float) -> str:
    """As in "about 3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"about {max(1, round(seconds))} s"
    if minutes < 60:
        return f"about {minutes} min"
    if minutes < 48 * 60:
        return f"about {minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    hours = round(minutes / 60)
    return f"about {hours // 24} days" + (f" {hours % 24} h" if hours % 24 else "")


def introduce(c: TrainConfig, model: RWKV, data: Dataset, training: Samples, held_out: HeldOut | None) -> None:
    """Say what is trained on what, for how long."""
    s = model.sizes
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = "all trained" if trained == every else f"{trained / 1e6:.2f} million trained"
    steps, per_step = schedule.total_steps(c), schedule.tokens_per_step(c)
    samples = steps * schedule.samples_per_step(c)
    masked = ", some masked" if training.stream.masked else ""
    say(
        f"model: RWKV-4, L{s.n_layer} D{s.n_embd} V{s.vocab_size}, {every / 1e6:.2f} million parameters, {what}\n"
        f"data:  {data.prefix}, {len(data):,} documents, {len(data.tokens):,} tokens{masked}\n"
        + (
            f"held:  {len(held_out.source.stream):,} tokens are held out; a loss reads {held_out.total:,} samples of them\n"
            if held_out
            else ""
        )
        + f"run:   {steps:,} steps of {per_step:,} tokens, {samples:,} samples in all ({_order(training)}, seed {training.seed})\n"
        + f"seen:  {_seen(training, samples)}\n"
        + f"end:   {_end(c)}\n"
        + f"types: {_types(c, model)}"
    )


def _end(c: TrainConfig) -> str:
    """What an epoch is, and what ends the run where."""
    per_epoch, last = schedule.steps_per_epoch(c), schedule.first_step(c) + schedule.total_steps(c)
    flag, epoch = schedule.ended_by(c), -(-last // per_epoch) - 1
    samples = per_epoch * schedule.samples_per_step(c)
    batches = f"{c.epoch_steps:,} batches" + (f" of each of {c.devices * c.num_nodes} devices" if c.devices * c.num_nodes > 1 else "")
    return (
        f"an epoch is {batches}: {per_epoch:,} steps, {samples:,} samples, {samples * c.ctx_len:,} tokens, whatever the size of the data; the"
        f" run ends {'after' if last % per_epoch == 0 else 'inside'} epoch {epoch}, with step {last:,}, by --{flag} {getattr(c, flag)}"
    )


def _types(c: TrainConfig, model: RWKV) -> str:
    """What is kept and computed in which type."""
    kept = {trains: sorted({str(p.dtype)[6:] for p in model.parameters() if p.requires_grad == trains}) for trains in (True, False)}
    precision = precision_of(c)
    products = {"tf32": "float32 by tf32 (10 bits)", "bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32")
    read = {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32")
    trained = "/".join(kept[True])
    weights = f"trained weights {trained} (they are the master weights), gradients {trained}, Adam's moments {trained}"
    if strategy.zero(c) and read != "float32":
        kept[False] = kept[False] and [read]
        weights = f"trained weights and gradients {read}, their master weights and Adam's moments float32 (DeepSpeed's way)"
    return (
        f"{precision}: {weights}"
        + (f", frozen weights {'/'.join(kept[False])}" if kept[False] else "")
        + f", matrix products {products}, WKV reads {read} and computes in float32, loss float32"
        + (", scaled" if precision == "fp16" else "")
    )


def _seen(training: Samples, samples: int) -> str:
    """How often so many samples show each document."""
    if isinstance(training, Documents):
        return (
            f"each document that fits {samples / training.distinct:.2g} times; a pass of {training.distinct:,} samples takes every one once"
        )
    times = samples * training.ctx_len / len(training.stream)
    if isinstance(training, Contexts) and training.prime:
        return f"each document {times:.2g} times; {training.prime:,} samples in a row go through the data, and come to no place twice"
    missed = math.exp(-times)  # of what is covered n · ctx_len / tokens times on average, by places that know nothing of each other
    rest = f", so that about {missed:.0%} of the tokens are not seen at all" if missed >= 0.01 else ""
    return f"each document {times:.2g} times on average; contexts begin at random places{rest}"


def _order(training: Samples) -> str:
    if isinstance(training, Documents):
        packed = training.packed
        left = packed.too_long + packed.too_short
        order = "in order" if training.sequential else "shuffled"
        return f"whole documents in {training.distinct:,} samples, {order}" + (f", {left:,} that do not fit left out" if left else "")
    prime = isinstance(training, Contexts) and training.prime
    return f"prime sampling, p = {prime}" if prime else "at random places"
