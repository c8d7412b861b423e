"""The server's output. Errors of writing it are ignored: they are no reason to fail requests."""

import contextlib
import sys
import traceback
from typing import TextIO

from rwkv.streams import silence


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line to a stream (default: stdout). It is lost if the disk is full or the reader of a
    pipe has exited.
    """
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # also for what is buffered, which Python writes again at exit
        with contextlib.suppress(OSError, ValueError):  # it may have no descriptor
            silence(stream.fileno())
    except OSError:
        pass


def say_traceback(error: Exception) -> None:
    """Print an error with its traceback to stderr."""
    say("".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip("\n"), sys.stderr)
