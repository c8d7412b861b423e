"""What the engine is asked to generate, and the events with which it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rwkv.sampling import Sampling


class Full(Exception):
    """The queue has no space for a request."""


class Closed(Exception):
    """The engine accepts no more requests."""


@dataclass(frozen=True)
class Token:
    """A generated token, with its log-probability and the most likely tokens instead of it, before
    temperature and penalties.
    """

    id: int
    bytes: bytes
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int  # characters of text before it


@dataclass(frozen=True)
class Event:
    """What a sequence has generated since its last event.

    Attributes:
        tokens: those that begin in `text`, if log-probabilities were requested.
        finish: why the sequence ended: "stop" (EOD or a stop text), "length", "cancelled" or
            "error"; "" if it has not ended.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: str = ""
    error: str = ""


@dataclass(eq=False)
class Request:
    """One sequence to generate.

    Args:
        prompt: token ids, at least one.
        seed: of sampling; None: a new one.
        logprobs: number of most likely tokens to report with each token; None: no
            log-probabilities.
        emit: called with every Event, in the thread of the engine. It must not wait.

    Attributes:
        cached: prompt tokens whose state was in the cache.
        generated: generated tokens, without EOD.
    """

    model: str
    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int
    emit: Callable[[Event], None]
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    cached: int = field(default=0, init=False)
    generated: int = field(default=0, init=False)
    cancelled: bool = field(default=False, init=False)
