"""Console output of a run: on rank 0 only, compatible with a progress bar; a closed terminal or
pipe is not an error.
"""

import contextlib
import sys
from typing import Any, TextIO

from tqdm import tqdm

from rwkv.errors import printable
from rwkv.streams import silence
from rwkv.train.runtime.lightning import rank_zero_only


class BestEffortStream:
    """A text stream that ignores write errors, e.g. after the terminal was closed or `head` has
    exited.
    """

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> int:
        """Write text; never raises OSError."""
        with self._without_errors():
            return self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; never raises OSError."""
        with self._without_errors():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @contextlib.contextmanager
    def _without_errors(self):
        try:
            yield
        except OSError:
            silence(self._file.fileno())


@rank_zero_only
def say(text: str) -> None:
    """Print a line on rank 0, above the progress bar. Control characters are escaped; write errors
    are ignored.
    """
    with tqdm.external_write_mode(file=sys.stdout, nolock=True):
        print(printable(text), file=BestEffortStream(sys.stdout), flush=True)


def duration(seconds: float) -> str:
    """Format a duration, e.g. "about 3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"about {max(1, round(seconds))} s"
    if minutes < 60:
        return f"about {minutes} min"
    if minutes < 48 * 60:
        return f"about {minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    hours = round(minutes / 60)
    return f"about {hours // 24} days" + (f" {hours % 24} h" if hours % 24 else "")
