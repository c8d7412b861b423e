"""Write samples of the model during training (--sample_every) to samples.jsonl."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv.config import TrainConfig
from rwkv.data import offsets
from rwkv.data.decoding import Vocabulary
from rwkv.data.token_stream import Stream
from rwkv.files import atomic_write, disk_errors
from rwkv.generate import STOP, question
from rwkv.models import RWKV
from rwkv.train.callbacks.checkpointing import Checkpointer
from rwkv.train.callbacks.metrics import Metrics
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.resume.tracked_folder import TrackedFolder
from rwkv.train.runtime.lightning import pl

NAME = "samples.jsonl"
TOKENS = 100  # of a sample
_PROMPTS = 3
_MAX_PROMPT = 512  # tokens
_LOOK = 4096  # tokens that are searched for the beginning of a document


@dataclass(frozen=True)
class Prompt:
    """A prompt: its ids and text, and how the document continues ("" if it is a question)."""

    ids: list[int]
    text: str
    reference: str = ""


def prompts(c: TrainConfig, stream: Stream, vocabulary: Vocabulary) -> list[Prompt]:
    """The questions of --sample_ask, or the beginnings of documents of the stream, always the same.

    Raises:
        UserError: the questions cannot be encoded.
    """
    if asked := [text.strip() for text in c.sample_ask.split("|") if text.strip()]:
        return [Prompt(vocabulary.encode(question(text)), question(text)) for text in asked]
    found = {}
    for i in range(_PROMPTS):
        begin = offsets.spread(i, _PROMPTS, max(1, len(stream) - 1))
        read = stream.read(begin, min(len(stream), begin + _LOOK))
        starts = [*np.flatnonzero(read.starts).tolist(), len(read.ids)]
        first, last = (starts[0], starts[1]) if len(starts) > 1 else (0, starts[0])
        ids, counted = read.ids[first:last].tolist(), np.flatnonzero(read.loss_mask[first:last])
        # the question of a chat; else the beginning of a text
        cut = int(counted[0]) if stream.masked and len(counted) and counted[0] else max(1, len(ids) // 4)
        prompt, rest = ids[:cut][-_MAX_PROMPT:], ids[cut : cut + TOKENS]
        rest = rest[:-1] if rest and rest[-1] == vocabulary.eod else rest
        if c.objective == "dpo":  # it may be a rejected answer
            rest = []
        found[begin + first] = Prompt(prompt, vocabulary.decode(prompt), vocabulary.decode(rest))
    return list(found.values())


@torch.no_grad()
def continuation(model: RWKV, ids: list[int], eod: int, length: int) -> list[int]:
    """The most likely continuation of a document that begins with `ids` (at least one), up to its
    end. A tuned state replaces EOD before it, as in rwkv.generate. The model is in evaluation mode.
    No random number is drawn.
    """
    device = next(model.parameters()).device
    before = [] if model.sizes.time_state else [max(0, eod)]
    tokens, state, written = torch.tensor([[*before, *ids]], device=device), None, list[int]()
    for _ in range(length):
        hidden, state = model.hidden(tokens, state)
        token = int(model.head(hidden[0, -1]).argmax())
        if token == eod:
            break
        written.append(token)
        tokens = torch.tensor([[token]], device=device)
    return written


class Sampler(pl.Callback):
    """Writes samples before the first step, every --sample_every steps and at the end, on rank 0.
    (ZeRO-3, where rank 0 does not have the weights, is rejected at the start.)

    A resumed run drops the samples of later steps. Training is not affected: generation is greedy.
    """

    def __init__(
        self,
        config: TrainConfig,
        tracked: TrackedFolder,
        chosen: list[Prompt],
        vocabulary: Vocabulary,
        metrics: Metrics,
        checkpointer: Checkpointer,
    ):
        self.config, self._folder, self._prompts, self._vocabulary = config, tracked, chosen, vocabulary
        self._metrics, self._checkpointer = metrics, checkpointer
        self._last = -1  # step of the latest samples

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        if trainer.global_rank > 0:
            return
        kept = keep_steps(self._folder.path() / NAME, module.step)
        self._last = kept[-1]["step"] if kept else -1
        first = module.step == schedule.first_step(self.config)
        if self._last < module.step and (first or not kept or self._due(module)):
            self._write(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: TrainingModule, *_) -> None:
        if trainer.global_rank == 0 and module.step != self._last and self._due(module):
            self._write(trainer, module)

    def _due(self, module: TrainingModule) -> bool:
        """Whether samples are written after this step."""
        step = module.step
        return step % self.config.sample_every == 0 or step == module.end or self._checkpointer.best.exhausted

    def _write(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self._last, training = module.step, module.model.training
        module.model.eval()
        with trainer.precision_plugin.forward_context():
            written = [continuation(module.model, prompt.ids, self._vocabulary.eod, TOKENS) for prompt in self._prompts]
        module.model.train(training)
        path = self._folder.path() / NAME
        with disk_errors(path, "The run then continues from its last state"), open(path, "a", encoding="utf-8") as file:
            for prompt, ids in zip(self._prompts, written, strict=True):
                text = self._vocabulary.decode(ids)
                if self.config.sample_ask:
                    text = text.split(STOP[0])[0].strip()
                line = {"step": module.step, "prompt": prompt.text, "text": text, "reference": prompt.reference}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._metrics.restart_clock()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl; invalid ones, such as one that was not written to its end, are
    omitted.
    """
    found = []
    for raw in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and isinstance(line.get("text"), str):
            found.append(line)
    return found


def keep_steps(path: Path, last: int) -> list[dict[str, Any]]:
    """Drop the samples of steps after `last`; returns the others."""
    kept = [line for line in read(path) if line["step"] <= last]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return kept
