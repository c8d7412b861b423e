"""Losses of a model on documents: loss per token, perplexity, bits per byte.

A document is scored as in training: after EOD, every token is predicted from all tokens before it
in the document, long documents in chunks that carry the state. Tokens that a loss mask excludes are
context only. The same input gives the same result, to the bit on one machine.

A model with a tuned state begins documents with it instead of EOD, as in generation; their first
tokens, which nothing predicts, are not scored.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv.data.token_stream import Stream
from rwkv.errors import UserError
from rwkv.models import RWKV
from rwkv.models.state import State

CHUNK = 512  # tokens of a document in one forward pass
_SLICE = 128  # tokens whose logits are in memory at a time, per document
_POOL = 64  # batches whose documents are sorted by length, so that little is padded
Progress = Callable[[int], Any] | None


class Decoder(Protocol):
    """Converts ids to bytes."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids."""


@dataclass(frozen=True)
class Document:
    """A document to score.

    Attributes:
        ids: int64 [n].
        loss_mask: bool [n], True for the tokens that are scored.
    """

    ids: np.ndarray
    loss_mask: np.ndarray


@dataclass
class Score:
    """Sums over documents.

    Attributes:
        nats: the negative log-likelihood of the scored tokens.
        tokens, bytes: number of scored tokens, and of the bytes they decode to; bytes is 0 without
            a decoder.
        correct: number of scored tokens that were the most likely ones.
    """

    documents: int = 0
    tokens: int = 0
    nats: float = 0.0
    bytes: int = 0
    correct: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def loss(self) -> float:
        """Nats per token; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of the scored text; None if its bytes are unknown."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def as_json(self) -> dict[str, Any]:
        """The figures for a JSON file."""
        return {
            **vars(self),
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.correct / self.tokens if self.tokens else math.nan,
        }


def documents(stream: Stream) -> Iterator[Document]:
    """The documents of a token stream."""
    edges = stream.document_starts().tolist()
    for begin, end in itertools.pairwise(edges):
        read = stream.read(begin, end)
        yield Document(read.ids, read.loss_mask)


def score(
    model: RWKV,
    source: Iterable[Document],
    decoder: Decoder | None = None,
    eod: int = 0,
    batch: int = 8,
    window: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress = None,
) -> Score:
    """Score documents.

    Args:
        batch: documents in a forward pass.
        window: split documents into windows of this many tokens, each without the context of the
            earlier ones; 0: the whole document is context.
        dtype: of matmuls, if not the weights'.
        progress: called with the number of tokens that were scored since the last call.

    Raises:
        UserError: an id is outside the model's vocabulary, or the logits are NaN.
    """
    total, pool = Score(), list[Document]()
    for document in source:
        pool.append(document)
        if len(pool) == _POOL * batch:
            total, pool = total + _score_pool(model, pool, decoder, eod, batch, window, dtype, progress), []
    return total + _score_pool(model, pool, decoder, eod, batch, window, dtype, progress)


def _score_pool(
    model: RWKV,
    pool: list[Document],
    decoder: Decoder | None,
    eod: int,
    batch: int,
    window: int,
    dtype: Any,
    progress: Progress,
) -> Score:
    total = Score()
    ordered = sorted(pool, key=lambda document: -len(document.ids))
    for i in range(0, len(ordered), batch):
        group = ordered[i : i + batch]
        losses, best = token_losses(model, [document.ids for document in group], eod, window, dtype, progress)
        for document, nats, right in zip(group, losses, best, strict=True):
            mask = document.loss_mask & (np.arange(len(document.ids)) >= model.sizes.time_state)
            size = len(decoder.decode_bytes(document.ids[mask].tolist())) if decoder else 0
            total += Score(1, int(mask.sum()), float(nats[mask].sum()), size, int(right[mask].sum()))
    return total


@torch.inference_mode()
def token_losses(
    model: RWKV,
    texts: Sequence[Sequence[int] | np.ndarray],
    eod: int = 0,
    window: int = 0,
    dtype: Any = None,
    progress: Progress = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each text (ids), the loss of every token in nats, float64, given EOD and the tokens
    before it; and whether it was the most likely token. After a tuned state instead of EOD, the
    first token has the loss of a uniform distribution. Other arguments as in `score`.
    """
    first = int(model.sizes.time_state)
    device, vocab_size = model.emb.weight.device, model.sizes.vocab_size
    lengths = np.array([len(ids) for ids in texts], int)
    longest = int(lengths.max(initial=0))
    padded = np.zeros((len(texts), longest + 1), np.int64)
    padded[:, 0] = eod
    for row, ids in zip(padded, texts, strict=True):
        row[1 : 1 + len(ids)] = ids
    if longest and not 0 <= padded.min() <= padded.max() < vocab_size:
        wrong = padded.min() if padded.min() < 0 else padded.max()
        raise UserError(
            f"token id {wrong} is outside the model's vocabulary of {vocab_size}; use data converted with the model's tokenizer"
        )
    losses, best = np.full((len(texts), longest), math.log(vocab_size)), np.zeros((len(texts), longest), bool)
    model.eval()
    state: State | None = None
    tokens = torch.from_numpy(padded[:, first:]).to(device)
    with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
        for begin, end in _chunks(longest - first, window):
            if window and begin % window == 0:
                state = None
            hidden, state = model.hidden(tokens[:, begin:end], state)
            for a in range(begin, end, _SLICE):
                b = min(end, a + _SLICE)
                logits = model.head(hidden[:, a - begin : b - begin]).float()
                targets = tokens[:, a + 1 : b + 1]
                losses[:, first + a : first + b] = _cross_entropy(logits, targets).double().cpu().numpy()
                best[:, first + a : first + b] = (logits.argmax(-1) == targets).cpu().numpy()
            if progress:
                before, now = (np.minimum(lengths, place + first if place else 0) for place in (begin, end))
                progress(int((now - before).sum()))
    found = [losses[i, : len(ids)] for i, ids in enumerate(texts)]
    if not all(np.isfinite(one).all() for one in found):
        raise UserError(
            "the model's logits are NaN or Inf; use --dtype fp32, and if they still are, the checkpoint is corrupt"
        )
    return found, [best[i, : len(ids)] for i, ids in enumerate(texts)]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _chunks(length: int, window: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most CHUNK tokens that do not cross a window's border."""
    begin = 0
    while begin < length:
        end = min(length, begin + CHUNK, (begin // window + 1) * window if window else length)
        yield begin, end
        begin = end
