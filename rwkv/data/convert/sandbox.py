"""A Jinja environment for untrusted templates: sandboxed, with limits on time, memory and
output.
"""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS = 10.0  # CPU time limit per conversation
MEMORY = 1 << 28  # bytes of address space that a template may add to the process
_BITS = 1 << 12  # maximum size of an integer


class LimitExceeded(Exception):
    """A template exceeded a limit."""


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """An environment with transformers' settings and bounded integers: Python cannot be interrupted
    within one arithmetic operation.
    """

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context, operator, left, right):
        """`left operator right`. Raises LimitExceeded if an integer would exceed _BITS bits."""
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                max(1, left.bit_length()) * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            )
            if bits > _BITS:
                raise LimitExceeded(f"it computes an integer of {bits} bits")
        return super().call_binop(context, operator, left, right)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise LimitExceeded if the block takes more than SECONDS or MEMORY. Time is limited only in
    the main thread (by a signal).
    """
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
        raise LimitExceeded(f"it takes more than {MEMORY >> 20} MiB of memory") from error
    except RecursionError as error:
        raise LimitExceeded("it recurses too deeply") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if timed:
            signal.signal(signal.SIGVTALRM, before)


def _late(number, frame):
    raise LimitExceeded(f"it did not finish within {SECONDS:g} seconds")


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
