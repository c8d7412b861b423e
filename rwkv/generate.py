"""Text generation with a recurrent state: the cost per token does not depend on the length of the
text before it.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rwkv.data.convert.roles import fold
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError
from rwkv.models import RWKV, State
from rwkv.sampling import Sampling, sample_token
from rwkv.text_stream import OPENING, STOP, Answer, TextStream

_PREFILL = 256  # prompt tokens per forward pass


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
    """The model's state after the text read and written so far. The text begins with EOD, which is
    before every document in training; a tuned initial state replaces it.

    Attributes:
        ended: why the last `write` ended: "eod", "stop" (a stop text), "length" (max_tokens) or
            "cancelled".
        dtype: dtype of matmuls, if not the weights'.

    Args:
        state: a tuned initial state, for one batch row (rwkv.adapter_files.load_state). Without
            it that of the model, if it has one.
    """

    def __init__(
        self,
        model: RWKV,
        tokenizer: WorldTokenizer,
        dtype: torch.dtype | None = None,
        state: State | None = None,
    ):
        self.dtype = dtype
        self.model, self.tokenizer = model.eval(), tokenizer
        self.ended = ""
        self.state = state
        tuned = state is not None or any(name.endswith(".time_state") for name, _ in model.named_parameters())
        # uniform before the first token, if there is no EOD
        self.logits = model.emb.weight.new_zeros(len(model.emb.weight)) if tuned else self._feed([tokenizer.eod])

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
        stream, counts = TextStream(stop), dict[int, float]()
        self.ended = "length"
        # (number of characters, state and logits after them)
        marks = collections.deque([(0, self.state, self.logits)], maxlen=stream.hold + 8)
        for _ in range(max_tokens):
            if cancelled():
                self.ended = "cancelled"
                break
            token = sample_token(self.logits, sampling, counts, generator)
            if token == self.tokenizer.eod:
                self.ended = "eod"
                break
            counts = sampling.count(counts, token)
            part = stream.add(self.tokenizer.decode_bytes([token]))
            if stream.stopped:
                self.ended = "stop"
                self._rewind(marks, stream.text)
                if part:
                    yield part
                return
            self.logits = self._feed([token])
            if len(stream.text) > marks[-1][0] and not stream.inside_character:
                marks.append((len(stream.text), self.state, self.logits))
            if part:
                yield part
        if part := stream.end():
            yield part

    def _rewind(self, marks: collections.deque, text: str) -> None:
        """Return to the state after `text`, the beginning of what was generated."""
        at, self.state, self.logits = next(mark for mark in reversed(marks) if mark[0] <= len(text))
        self.read(text[at:])

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
            of the conversation; "none": the model decides.

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
        begin, answer = (session.state, session.logits), Answer(self.think)
        session.read(OPENING[self.think])
        try:
            if opening := answer.begin():
                yield opening
            for part in session.write(sampling, max_tokens, STOP, generator, cancelled):
                if shown := answer.add(part):
                    yield shown
        finally:
            # re-encode the answer with its closing blank line, so that the tokens are those of
            # training data
            session.state, session.logits = begin
            session.read(f" {answer.text}\n\n" if answer.text else "\n\n")


def question(text: str) -> str:
    """The prompt for a message. Blank lines inside it become line breaks, as in training data,
    because they end turns.
    """
    return f"User: {fold(text)}\n\nAssistant:"
