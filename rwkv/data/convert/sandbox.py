"""A Jinja environment for templates that others wrote: no access to Python, and bounded in time, memory and output."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS = 10.0  # of processor time, for one conversation
MEMORY = 1 << 28  # bytes that a template may take beside what the process has
_BITS = 1 << 12  # of an integer


class TooMuch(Exception):
    """A template that does not end, or wants more memory than it may have."""


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' settings, with arithmetic whose results are bounded: Python cannot be interrupted inside it."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context, operator, left, right):
        """`left operator right`. Raises TooMuch if an integer would be of more than _BITS bits."""
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                max(1, left.bit_length()) * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            )
            if bits > _BITS:
                raise TooMuch(f"it computes with a number of {bits} bits")
        return super().call_binop(context, operator, left, right)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raises TooMuch for what takes more than SECONDS or MEMORY. The time is bounded in the main thread only, where signals arrive."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + MEMORY
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    timed = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, _late) if timed else None
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            yield
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except MemoryError as error:
        raise TooMuch(f"it takes more than {MEMORY >> 20} MiB of memory") from error
    except RecursionError as error:
        raise TooMuch("it calls itself without end") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if timed:
            signal.signal(signal.SIGVTALRM, before)


def _late(number, frame):
    raise TooMuch(f"it has not ended after {SECONDS:g} seconds")


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
