"""Text generation with a recurrent state: the cost per token does not depend on the length of the
text before it.
"""

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

_PREFILL = 256  # prompt tokens per forward pass
_COLDEST = 1e-4  # temperature, in effect greedy; logits divided by a smaller one may overflow


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. temperature 0 is greedy. Penalties are those of ChatRWKV: presence +
    frequency · count, with counts multiplied by `penalty_decay` after every token."""

    temperature: float = 1.0
    top_p: float = 0.85
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996


def sample_token(
    logits: Tensor, sampling: Sampling, counts: dict[int, float], generator: torch.Generator | None = None
) -> int:
    """Sample the next token from logits [V]; `counts` are the decayed counts of earlier tokens."""
    logits = logits.float().clone()
    for token, count in counts.items():
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    if sampling.temperature <= 0:
        return int(logits.argmax())
    logits /= max(sampling.temperature, _COLDEST)
    probabilities, tokens = torch.softmax(logits, -1).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    dropped = before >= sampling.top_p
    dropped[0] = False  # always keep the most likely token
    probabilities = probabilities.masked_fill(dropped, 0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def matrices_dtype(requested: str, stored: torch.dtype, gpu: bool) -> torch.dtype | None:
    """dtype of a model's matrices and matmuls; None: fp32.

    Args:
        requested: value of --dtype.
        stored: dtype of the checkpoint's matrices, used for "auto" where the device supports it.

    Raises:
        UserError: the device does not support the dtype.
    """
    bf16 = not gpu or torch.cuda.get_device_capability()[0] >= 8
    if requested == "auto":
        return stored if gpu and (stored == torch.float16 or (stored == torch.bfloat16 and bf16)) else None
    if requested == "fp16" and not gpu:
        raise UserError("--dtype fp16 needs a GPU; on a CPU use bf16 or fp32")
    if requested == "bf16" and not bf16:
        raise UserError("--dtype bf16 needs a GPU of compute capability 8.0 or later (Ampere); use fp16 or fp32")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(requested)


class Session:
    """The model's state after the text read and written so far, which begins with EOD, like every
    training document.

    Attributes:
        ended: why the last `write` ended: "eod", "stop" (a stop text), "length" (max_tokens) or
            "cancelled".
        dtype: dtype of matmuls, if not the weights'.
    """

    def __init__(self, model: RWKV, tokenizer: WorldTokenizer, dtype: torch.dtype | None = None):
        self.dtype = dtype
        self.model, self.tokenizer = model.eval(), tokenizer
        self.ended = ""
        self.state: State | None = None
        self.logits = self._feed([tokenizer.eod])

    def read(self, text: str) -> None:
        """Feed a text to the model."""
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
        """Generate up to max_tokens tokens, until EOD or one of the stop texts; yields text as soon
        as characters are complete.

        Afterwards the state is that at the end of the yielded text: a generated stop text is
        removed from it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # characters withheld because they may begin a stop text
        hold = max((len(text) for text in stop), default=1) - 1
        counts: dict[int, float] = {}
        text, shown = "", 0
        self.ended = "length"
        # (number of characters, state and logits after them)
        marks = collections.deque([(0, self.state, self.logits)], maxlen=hold + 8)
        for _ in range(max_tokens):
            if cancelled():
                self.ended = "cancelled"
                break
            token = sample_token(self.logits, sampling, counts, generator)
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
        """Advance the state by the ids; returns the logits [V] after the last."""
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
    """A conversation in the World models' chat format, with the same tokens as the converter's for
    the same messages.

    Args:
        think: for RWKV-7 G1 models (RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt). "full": answers
            begin with thoughts, <think>…</think>; "fast": with an empty thought, which is not part
            of the conversation; "none": as the model likes.

    Attributes:
        session: the text so far; between turns it ends with a blank line.
    """

    def __init__(self, session: Session, think: str = "none"):
        self.session, self.think = session, think

    def ask(
        self,
        text: str,
        sampling: Sampling,
        max_tokens: int,
        generator: torch.Generator | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[str]:
        """Generate the answer to a message; yields it without surrounding whitespace, with the
        thoughts before it.

        If the caller stops early, the answer is the text yielded so far.
        """
        session = self.session
        session.read(question(text))
        begin, answer, held = (session.state, session.logits), "", ""
        session.read(OPENING[self.think])
        closing = ">" if self.think == "fast" else ""  # the rest of the opening
        try:
            if self.think == "full":
                answer = OPENING["full"].lstrip()
                yield answer
            for part in session.write(sampling, max_tokens, STOP, generator, cancelled):
                if answer:
                    part = held + part
                elif part := part.lstrip():
                    part, closing = part.removeprefix(closing).lstrip(), ""
                shown = part.rstrip()
                held = part[len(shown) :]
                if shown:
                    answer += shown
                    yield shown
        finally:
            # re-encode the answer with its closing blank line, so that the tokens are those of
            # training data
            session.state, session.logits = begin
            session.read(f" {answer}\n\n" if answer else "\n\n")


def question(text: str) -> str:
    """The prompt for a message. Blank lines inside it become line breaks, as in training data,
    because they end turns.
    """
    return f"User: {fold(text)}\n\nAssistant:"


# As upstream's templates, without the last ">": in text it is part of a longer token.
OPENING = {"none": "", "fast": " <think>\n</think", "full": " <think"}
STOP = ("\n\nUser:",)  # where a chat answer ends, if not with EOD
