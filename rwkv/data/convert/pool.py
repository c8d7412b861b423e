"""Ordered map over chunks in worker processes, with bounded memory; a killed worker is an error,
not a hang.
"""

import collections
import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from rwkv.errors import UserError

AHEAD = 4  # chunks per worker in flight (queued, being processed or done), which bounds memory
_ADVICE = "use fewer --workers, or smaller documents"
_KILLED = f"a worker process was killed, probably out of memory; {_ADVICE}"


def in_order(
    chunks: Iterable[Any], submit: Callable[[Any], Callable[[], Any]], ahead: int
) -> Iterator[tuple[Any, Any]]:
    """Yield (chunk, result) in the order of the chunks, of which at most `ahead` are in flight.

    A UserError raised by the iterable is raised after the results of the chunks before it.

    Args:
        submit: starts the work on a chunk; what it returns waits for the result, or raises.
    """
    waiting: collections.deque[tuple[Any, Callable[[], Any]]] = collections.deque()
    feed, failure = iter(chunks), None
    while True:
        try:
            for chunk in itertools.islice(feed, ahead - len(waiting)):
                waiting.append((chunk, submit(chunk)))
        except UserError as error:
            feed, failure = iter(()), error
        if not waiting:
            break
        chunk, result = waiting.popleft()
        yield chunk, result()
    if failure:
        raise failure


def attempt(function: Callable[[Any], Any], chunk: Any, advice: str = _ADVICE) -> tuple[bool, Any]:
    """(True, result of the function) or (False, exception). `advice`: what to do if there is too
    little memory.
    """
    try:
        return True, function(chunk)
    except MemoryError:
        return False, UserError(f"out of memory; {advice}")
    except Exception as error:
        return False, error
    except BaseException as error:  # a panic of a Rust library, which cannot be pickled
        return False, RuntimeError(f"{type(error).__name__}: {error}")


class Pool:
    """Applies a function to chunks in `workers` processes (in this process if 1); results are in
    order.

    Each worker has its own pipe and a thread in this process that sends it one chunk and waits for
    the result. Only the worker holds the other end of the pipe, so its death ends the wait at any
    moment, even in the middle of a result. (multiprocessing.Pool hangs then.)
    """

    def __init__(self, function: Callable[[Any], Any], workers: int):
        self._function, self._workers = function, workers
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._threads: list[threading.Thread] = []
        self._tasks: queue.SimpleQueue[tuple[Any, Future] | None] = queue.SimpleQueue()
        self._ok = True

    def __enter__(self) -> "Pool":
        if self._workers > 1:
            try:
                self._start()
            except BaseException:
                self._kill()
                raise
        return self

    def __exit__(self, kind, *_):
        for _thread in self._threads:
            self._tasks.put(None)
        if kind is None and self._ok:
            for thread in self._threads:
                thread.join()
            for pipe in self._pipes:
                pipe.close()  # a worker exits on EOF
            for process in self._processes:
                process.join(5)
        self._kill()

    def map(self, chunks: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield (chunk, result). A UserError raised by the iterable is raised after the results of
        the chunks before it.

        Raises:
            UserError: a worker was killed.
        """
        if not self._processes:
            for chunk in chunks:
                try:
                    result = self._function(chunk)
                except MemoryError as error:
                    raise UserError(f"out of memory; {_ADVICE}") from error
                yield chunk, result
            return
        try:
            yield from in_order(chunks, self._submit, AHEAD * self._workers)
        except BaseException:
            self._ok = False
            raise

    def _submit(self, chunk: Any) -> Callable[[], Any]:
        future: Future = Future()
        self._tasks.put((chunk, future))
        return future.result

    def _start(self) -> None:
        # fork shares the loaded vocabulary. All processes are forked before any thread starts.
        context = multiprocessing.get_context("fork")
        for _ in range(self._workers):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=_work, args=(self._function, theirs, [*self._pipes, ours]), daemon=True
            )
            self._pipes.append(ours)
            process.start()
            theirs.close()
            self._processes.append(process)
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            thread = threading.Thread(target=self._serve, args=(process, pipe), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, process: BaseProcess, pipe: Connection) -> None:
        while task := self._tasks.get():
            chunk, future = task
            try:
                pipe.send(chunk)
                ok, result = pipe.recv()
            except (EOFError, OSError):
                future.set_exception(UserError(_KILLED))
                self._fail()
                return
            except Exception as error:  # a chunk or result that cannot be pickled
                future.set_exception(error)
                continue
            future.set_result(result) if ok else future.set_exception(result)

    def _fail(self) -> None:
        """After the death of a worker: kill the others and fail all pending chunks."""
        self._ok = False
        for process in self._processes:
            process.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                if task := self._tasks.get_nowait():
                    task[1].set_exception(UserError(_KILLED))
        for _ in self._threads:  # the sentinels of __exit__ may have been removed above
            self._tasks.put(None)

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(10)
        for thread in self._threads:  # their reads end with the processes
            thread.join(10)
        for pipe in self._pipes:
            pipe.close()


def _work(function: Callable[[Any], Any], pipe: Connection, others: list[Connection]) -> None:
    for other in others:  # inherited; while they are open here, the parent's death gives no EOF
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunk = pipe.recv()
            try:
                pipe.send(attempt(function, chunk))
            except (AttributeError, TypeError, ValueError) as error:  # cannot be pickled
                pipe.send((False, RuntimeError(f"{type(error).__name__}: {error}")))
    os._exit(0)


def _exit_with_parent() -> None:
    """Exit when the parent dies, even by SIGKILL."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)
