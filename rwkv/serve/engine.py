"""Batched recurrent decoding: sequences join and leave a batch of states between any two tokens.

Each step decodes one token of every running sequence, and reads a chunk of the new prompts. Models
with different weights (adapters of one base) are run in turn. What a sequence generates depends on
its own request only, up to rounding: it has its own random generator.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rwkv.data.tokenizer import WorldTokenizer
from rwkv.models import RWKV, State
from rwkv.models.state import map_state
from rwkv.sampling import sample_tokens
from rwkv.serve import output
from rwkv.serve.cache import StateCache
from rwkv.serve.requests import Closed, Event, Full, Request, Token
from rwkv.serve.served import Served, initial_state
from rwkv.text_stream import TextStream

_CHUNK = 256  # prompt tokens per step and model, over all prompts: others wait no longer than for these
_SHARED = 16  # tokens that prompts must have in common for a state after these to be saved


class _Sequence:
    """A request that is being read or decoded.

    Attributes:
        tokens: prompt and generated tokens.
        read: how many of them are in the state.
        state: batch size 1; None while it is a row of its group's.
        hidden: the head's input [D] after the prompt.
        saves: numbers of tokens after which the state is saved in the cache, ascending.
    """

    def __init__(self, request: Request, served: Served, state: State):
        self.request, self.served = request, served
        self.tokens, self.read = list(request.prompt), 0
        self.state: State | None = state
        self.hidden: Tensor | None = None
        self.saves = [len(self.tokens)]
        self.output = TextStream(request.stop)
        self.counts: dict[int, float] = {}
        self.waiting: list[Token] = []  # not yet part of an event
        self.generator = torch.Generator()  # on the CPU, so that a seed means the same on a GPU
        self.generator.manual_seed(request.seed) if request.seed is not None else self.generator.seed()
        self.done, self.begun = False, time.monotonic()

    def accept(self, token: int, data: bytes, eod: bool, logprob: tuple[float, list[tuple[int, float]]] | None) -> None:
        """Continue with a sampled token, and emit what has become final."""
        request, text, finish = self.request, "", "stop"
        if not eod:
            if logprob is not None:
                self.waiting.append(Token(token, data, logprob[0], tuple(logprob[1]), len(self.output.text)))
            self.tokens.append(token)
            self.counts = request.sampling.count(self.counts, token)
            request.generated += 1
            text = self.output.add(data)
            finish = "stop" if self.output.stopped else "length" if request.generated >= request.max_tokens else ""
        if finish:
            text += self.output.end()
        if text or finish:
            # the tokens of a stop text are not shown
            end = len(self.output.text) + 1 if finish and not self.output.stopped else self.output.shown
            tokens = tuple(waiting for waiting in self.waiting if waiting.offset < end)
            self.waiting = self.waiting[len(tokens) :]
            self.done = bool(finish)
            request.emit(Event(text, tokens, finish))

    def fail(self, finish: str, error: str = "") -> None:
        """End the sequence."""
        self.done = True
        self.request.emit(Event(finish=finish, error=error))


class _Group:
    """The sequences of one model's weights: those whose prompts are being read, and those in the
    batch, with their states [B, ...].
    """

    def __init__(self, model: RWKV):
        self.model = model
        self.reading: list[_Sequence] = []
        self.rows: list[_Sequence] = []
        self.state: State | None = None

    @property
    def sequences(self) -> list[_Sequence]:
        """All sequences."""
        return [*self.reading, *self.rows]

    def row(self, i: int) -> State:
        """A copy of the state of a row, batch size 1."""
        assert self.state is not None
        return map_state(lambda tensor: tensor[i : i + 1].clone(), self.state)

    def regroup(self, joining: Sequence[_Sequence]) -> None:
        """Remove the rows of sequences that are done, and add others."""
        kept = [i for i, sequence in enumerate(self.rows) if not sequence.done]
        if len(kept) == len(self.rows) and not joining:
            return
        states = [sequence.state for sequence in joining if sequence.state is not None]
        if kept and self.state is not None:
            whole = len(kept) == len(self.rows)
            states.insert(0, self.state if whole else map_state(lambda tensor: tensor[kept], self.state))
        self.rows = [*(self.rows[i] for i in kept), *joining]
        self.state = stacked(states) if states else None
        for sequence in joining:
            sequence.state = None


def stacked(states: Sequence[State]) -> State:
    """One state of the batches of several."""
    if len(states) == 1:
        return states[0]
    return tuple(tuple(map(torch.cat, zip(*blocks, strict=True))) for blocks in zip(*states, strict=True))


class Engine:
    """Generates for many requests in one batch. `step` does the work; `worker.Worker` calls it in a
    thread.

    Args:
        served: models by name.
        dtype: dtype of matmuls, if not fp32.
        max_batch: sequences that are decoded at a time.
        max_queue: requests that may wait for a place among these.
        cache_bytes: memory for states of earlier prompts; 0: none.

    Attributes:
        changed: notified when there is work. Its lock guards the queue.
        closed: whether `close` was called.
        mean_seconds: moving average of the time of a sequence, from its first step to its end.
    """

    def __init__(
        self,
        served: Mapping[str, Served],
        tokenizer: WorldTokenizer,
        dtype: torch.dtype | None = None,
        *,
        max_batch: int = 32,
        max_queue: int = 128,
        cache_bytes: int = 0,
    ):
        self.served, self.tokenizer, self.dtype = dict(served), tokenizer, dtype
        self.max_batch, self.max_queue = max_batch, max_queue
        self.cache = StateCache(cache_bytes)
        self.changed, self.mean_seconds, self.closed = threading.Condition(), 0.0, False
        self._queue: deque[Request] = deque()
        self._groups = {id(one.model): _Group(one.model.eval()) for one in self.served.values()}

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of sequences that are read or decoded."""
        return sum(len(group.reading) + len(group.rows) for group in self._groups.values())

    def submit(self, requests: Sequence[Request]) -> None:
        """Add requests to the queue, all or none. Thread-safe.

        Raises:
            Full: the queue has no space for all of them.
            Closed: after `close`.
        """
        with self.changed:
            if self.closed:
                raise Closed
            free = max(0, self.max_batch - self.running) + self.max_queue - len(self._queue)
            if len(requests) > free:
                raise Full
            self._queue.extend(requests)
            self.changed.notify()

    def cancel(self, request: Request) -> None:
        """End a request before its next token, unless it has ended. Thread-safe."""
        with self.changed:
            request.cancelled = True
            self.changed.notify()

    def close(self) -> None:
        """End all requests before their next token, and accept no more. Thread-safe."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._queue or self.running)

    @torch.inference_mode()
    def step(self) -> None:
        """Decode one token of every sequence in the batches, and read a chunk of the new
        prompts.
        """
        self._admit()
        for group in self._groups.values():
            try:
                for sequence in group.sequences:
                    if (sequence.request.cancelled or self.closed) and not sequence.done:
                        sequence.fail("cancelled")
                group.reading = [sequence for sequence in group.reading if not sequence.done]
                group.regroup(())
                if group.rows:
                    self._decode(group)
                if group.reading:
                    self._read(group)
            except Exception as error:  # e.g. out of memory: ends these requests, not the server
                message = _failure(error)
                for sequence in group.sequences:
                    if not sequence.done:
                        sequence.fail("error", message)
                group.reading, group.rows, group.state = [], [], None

    def _admit(self) -> None:
        """Move requests from the queue to their groups while there are places."""
        while True:
            with self.changed:
                if not self._queue:
                    return
                cancelled = next((request for request in self._queue if request.cancelled or self.closed), None)
                if cancelled is None and self.running >= self.max_batch:
                    return
                request = cancelled or self._queue[0]
                self._queue.remove(request)
            if cancelled is not None:
                request.emit(Event(finish="cancelled"))
                continue
            served = self.served[request.model]
            try:
                sequence = _Sequence(request, served, initial_state(served, self.dtype))
                if self.cache.max_bytes:
                    self._look_up(sequence)
            except Exception as error:
                request.emit(Event(finish="error", error=_failure(error)))
                continue
            self._groups[id(served.model)].reading.append(sequence)

    def _look_up(self, sequence: _Sequence) -> None:
        """Begin with a state from the cache, and plan what to save."""
        name, tokens = sequence.served.name, sequence.tokens
        found, entry = self.cache.longest(name, tokens)
        if entry is not None:
            sequence.state, sequence.hidden = entry.state, entry.hidden
            sequence.read = sequence.request.cached = found
        shared = self.cache.shared(name, tokens)
        sequence.saves = [n for n in (shared, len(tokens)) if n > max(found, _SHARED - 1)]
        if shared == len(tokens):
            sequence.saves = sequence.saves[:1]

    def _run(self, group: _Group, tokens: list[list[int]], state: State) -> tuple[Tensor, State]:
        """The head's input [B, D] after tokens [B, T], and the state."""
        device = group.model.emb.weight.device
        with self._autocast(device):
            hidden, state = group.model.hidden(torch.tensor(tokens, dtype=torch.long, device=device), state)
        return hidden[:, -1], state

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def _read(self, group: _Group) -> None:
        """Read a chunk of the prompts: of each as many tokens as the shortest has left."""
        reading = [sequence for sequence in group.reading if sequence.read < len(sequence.tokens)]
        if reading:
            ends = [next((n for n in s.saves if n > s.read), len(s.tokens)) for s in reading]
            width = min(max(1, _CHUNK // len(reading)), *(end - s.read for end, s in zip(ends, reading, strict=True)))
            chunk = [sequence.tokens[sequence.read : sequence.read + width] for sequence in reading]
            hidden, state = self._run(group, chunk, stacked([s.state for s in reading if s.state is not None]))
            for i, sequence in enumerate(reading):
                sequence.read += width
                sequence.state = map_state(lambda tensor, i=i: tensor[i : i + 1].clone(), state)  # type: ignore[misc]
                sequence.hidden = hidden[i].clone()
                if sequence.read in sequence.saves:
                    self._save(sequence, sequence.state, sequence.hidden)
        ready = [sequence for sequence in group.reading if sequence.read == len(sequence.tokens)]
        if ready:
            group.reading = [sequence for sequence in group.reading if sequence not in ready]
            self._continue(group, ready, torch.stack([s.hidden for s in ready if s.hidden is not None]))
            group.regroup([sequence for sequence in ready if not sequence.done])

    def _decode(self, group: _Group) -> None:
        """Read the last token of each row, and sample the next."""
        assert group.state is not None
        hidden, group.state = self._run(group, [sequence.tokens[-1:] for sequence in group.rows], group.state)
        for sequence in group.rows:
            sequence.read += 1
        self._continue(group, group.rows, hidden)
        if self.cache.max_bytes:  # the next message of a conversation may follow
            for i, sequence in enumerate(group.rows):
                if sequence.done and not sequence.request.cancelled and sequence.read >= _SHARED:
                    self._save(sequence, group.row(i), hidden[i].clone())
        group.regroup(())

    def _save(self, sequence: _Sequence, state: State, hidden: Tensor) -> None:
        if self.cache.max_bytes:
            self.cache.put(sequence.served.name, sequence.tokens[: sequence.read], state, hidden)

    def _continue(self, group: _Group, sequences: Sequence[_Sequence], hidden: Tensor) -> None:
        """Sample and accept the next token of each sequence, from the head's input [B, D]."""
        with self._autocast(hidden.device):
            logits = group.model.head(hidden).float()
        finite = logits.sum(-1).isfinite().tolist()
        tokens = sample_tokens(
            logits if all(finite) else logits.nan_to_num(0.0),
            [sequence.request.sampling for sequence in sequences],
            [sequence.counts for sequence in sequences],
            [sequence.generator for sequence in sequences],
        )
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            if not finite[i]:
                sequence.fail("error", "the model's logits are NaN or Inf; use --dtype fp32")
                continue
            count = sequence.request.logprobs
            logprob = None if count is None else _logprobs(logits[i], token, count)
            eod = token == self.tokenizer.eod
            sequence.accept(token, b"" if eod else self.tokenizer.decode_bytes([token]), eod, logprob)
            if sequence.done:
                self.mean_seconds += 0.1 * (time.monotonic() - sequence.begun - self.mean_seconds)


def _failure(error: Exception) -> str:
    """The message of an error for clients; its traceback goes to stderr."""
    output.say_traceback(error)
    return f"{type(error).__name__} while generating; the output of the server has the details"


def _logprobs(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """From logits [V]: the log-probability of a token, and the `count` most likely tokens."""
    found = logits.log_softmax(-1)
    values, ids = found.topk(count) if count else (found[:0], found[:0].long())
    return float(found[token]), list(zip(ids.tolist(), values.tolist(), strict=True))
