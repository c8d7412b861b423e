"""Work shared out to processes in order, with a bounded number of pieces under way."""

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from rwkv.errors import UserError

_AHEAD = 4  # chunks per worker that are under way at once; they bound the memory
_function: Callable[[Any], Any]


class Pool:
    """A function on chunks in `workers` processes, or in this one if one is enough; results in the order of the chunks."""

    def __init__(self, function: Callable[[Any], Any], workers: int):
        self._function, self._workers = function, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Pool":
        if self._workers > 1:
            # fork, as torch's DataLoader does: the vocabulary is there at once, and once in memory
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(self._workers, context, _start, (self._function,))
            self._pool.submit(int)  # now, before other threads start
        return self

    def __exit__(self, *_):
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, chunks: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Each chunk with what it became. A UserError in reading comes after the results of what was read before it."""
        if not self._pool:
            for chunk in chunks:
                yield chunk, self._function(chunk)
            return
        waiting: collections.deque[tuple[Any, Future]] = collections.deque()
        feed, failure = iter(chunks), None
        try:
            while True:
                try:
                    for chunk in itertools.islice(feed, _AHEAD * self._workers - len(waiting)):
                        waiting.append((chunk, self._pool.submit(_call, chunk)))
                except UserError as error:
                    feed, failure = iter(()), error
                if not waiting:
                    break
                chunk, future = waiting.popleft()
                yield chunk, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was ended from outside, most likely for want of memory; give fewer --workers, or smaller documents"
            ) from error
        if failure:
            raise failure


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent killed with -9 cannot end its workers."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)


def _call(chunk: Any) -> Any:
    return _function(chunk)
