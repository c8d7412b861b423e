"""Generation: the state is carried from token to token, so that the cost of a token does not grow with the text before it."""

import codecs
import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv.data.convert.roles import fold
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError
from rwkv.models import RWKV, State

_PREFILL = 256  # prompt tokens that go through the model at once


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the likeliest. Penalties as in ChatRWKV: presence + frequency · count,
    where past occurrences fade by `penalty_decay` per token."""

    temperature: float = 1.0
    top_p: float = 0.85
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996


def choose(
    logits: Tensor, sampling: Sampling, counts: dict[int, float], generator: torch.Generator | None = None
) -> int:
    """The next token from logits [V], given how often each earlier one counts."""
    logits = logits.float().clone()
    for token, count in counts.items():
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    if sampling.temperature <= 0:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits / sampling.temperature, -1).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    dropped = before >= sampling.top_p
    dropped[0] = False  # the likeliest always stays
    probabilities = probabilities.masked_fill(dropped, 0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def matrices_dtype(asked: str, stored: torch.dtype, gpu: bool) -> torch.dtype | None:
    """What a model's matrices are kept and multiplied in, for --dtype `asked` and a checkpoint whose matrices are `stored`; None: fp32.

    Raises:
        UserError: this device does not multiply in it.
    """
    bf16 = not gpu or torch.cuda.get_device_capability()[0] >= 8
    if asked == "auto":
        return stored if gpu and (stored == torch.float16 or (stored == torch.bfloat16 and bf16)) else None
    if asked == "fp16" and not gpu:
        raise UserError("--dtype fp16 needs a GPU; on a CPU use bf16 or fp32")
    if asked == "bf16" and not bf16:
        raise UserError("--dtype bf16 needs a GPU of compute capability 8.0 or later (Ampere); use fp16 or fp32")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(asked)


class Session:
    """A text that grows: the model's state after everything read and written so far.

    Begins with EOD, as every document in training does.

    Attributes:
        ended: why `write` ended last: "eod", "stop" (a stop text), "length" (max_tokens) or "cancelled".
        dtype: what products are computed in, where it is not the weights' own.
    """

    def __init__(self, model: RWKV, tokenizer: WorldTokenizer, dtype: torch.dtype | None = None):
        self.dtype = dtype
        self.model, self.tokenizer = model.eval(), tokenizer
        self.ended = ""
        self.state: State | None = None
        self.logits = self._feed([tokenizer.eod])

    def read(self, text: str) -> None:
        """Take in a text."""
        ids = self.tokenizer.encode(text)
        if ids:
            self.logits = self._feed(ids)

    def write(
        self,
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str] = (),
        generator: torch.Generator | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[str]:
        """Generate up to max_tokens, until EOD or one of the stop texts; yields text as soon as its characters are whole.

        Afterwards the session stands where the yielded text ends: what was generated of a stop text is taken back.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        hold = max((len(text) for text in stop), default=1) - 1  # characters that may yet turn out to begin a stop text
        counts: dict[int, float] = {}
        text, shown = "", 0
        self.ended = "length"
        marks = collections.deque(
            [(0, self.state, self.logits)], maxlen=hold + 8
        )  # (characters, state and logits there)
        for _ in range(max_tokens):
            if cancelled():
                self.ended = "cancelled"
                break
            token = choose(self.logits, sampling, counts, generator)
            if token == self.tokenizer.eod:
                self.ended = "eod"
                break
            counts = {t: c * sampling.penalty_decay for t, c in counts.items()}
            counts[token] = counts.get(token, 0.0) + 1
            text += decoder.decode(self.tokenizer.decode_bytes([token]))
            found = [at for word in stop if (at := text.find(word, max(0, shown - hold))) >= 0]
            if found:
                self.ended = "stop"
                self._rewind(marks, text, min(found))
                text = text[: min(found)]
                break
            self.logits = self._feed([token])
            if len(text) > marks[-1][0] and not decoder.getstate()[0]:  # not inside a character
                marks.append((len(text), self.state, self.logits))
            if len(text) - hold > shown:
                yield text[shown : len(text) - hold]
                shown = len(text) - hold
        text += decoder.decode(b"", final=True)
        if len(text) > shown:
            yield text[shown:]

    def _rewind(self, marks: collections.deque, text: str, end: int) -> None:
        at, self.state, self.logits = next(mark for mark in reversed(marks) if mark[0] <= end)
        self.read(text[at:end])

    @torch.inference_mode()
    def _feed(self, ids: Sequence[int]) -> Tensor:
        """Advance the state by the ids; logits [V] after the last."""
        device = self.model.emb.weight.device
        with torch.autocast(device.type, self.dtype) if self.dtype else contextlib.nullcontext():
            for part in torch.tensor(ids, dtype=torch.long, device=device).split(_PREFILL):
                hidden, self.state = self.model.hidden(part[None], self.state)
            logits = self.model.head(hidden[0, -1]).float()
        if not logits.isfinite().all():
            raise UserError(
                "the model's logits are NaN or Inf; use --dtype fp32, and if they still are, the checkpoint is corrupt"
            )
        return logits


class Chat:
    """A conversation in the World models' chat format: the model reads exactly the tokens that the converter makes of the same messages.

    Attributes:
        session: the text so far; it ends with a blank line, as a turn does, whenever no answer is being generated.
    """

    def __init__(self, session: Session):
        self.session = session

    def ask(
        self,
        text: str,
        sampling: Sampling,
        max_tokens: int,
        generator: torch.Generator | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[str]:
        """Generate the answer to a message; yields it without whitespace around it. If the caller stops early, what was yielded is the answer."""
        session = self.session
        session.read(question(text))
        begin, answer, held = (session.state, session.logits), "", ""
        try:
            for part in session.write(sampling, max_tokens, STOP, generator, cancelled):
                part = held + part if answer else part.lstrip()
                shown = part.rstrip()
                held = part[len(shown) :]
                if shown:
                    answer += shown
                    yield shown
        finally:  # whatever the model wrote after the answer, one blank line separates turns, in the tokens that training has for it
            session.state, session.logits = begin
            session.read(f" {answer}\n\n" if answer else "\n\n")


def question(text: str) -> str:
    """A message to a World model, ready for the answer: blank lines end turns, so those inside it become line breaks, as in training data."""
    return f"User: {fold(text)}\n\nAssistant:"


STOP = ("\n\nUser:",)  # where a chat answer ends, if not with EOD
