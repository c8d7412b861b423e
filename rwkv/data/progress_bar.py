"""A progress bar in a terminal; one line a minute in a log."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60  # interval of lines without a terminal


def progress_bar(total: int, what: str, unit: str, delay: float = 0) -> Any:
    """A tqdm, or Lines if stderr is not a terminal.

    Args:
        delay: seconds before the bar appears.
    """
    if sys.stderr.isatty():
        return tqdm(
            total=total, unit=unit, unit_scale=True, desc=what, mininterval=0.5, dynamic_ncols=True, delay=delay
        )
    return Lines(total, what, unit)


class Lines:
    """The part of tqdm's interface that is used here, without control characters: nothing in the
    first minute, then one line a minute.
    """

    def __init__(self, total: int, what: str, unit: str):
        self.total, self.n = total, 0
        self._what, self._unit, self._note = what, unit, ""
        self._begun = self._printed = time.monotonic()

    def update(self, n: int) -> None:
        """Count n more units."""
        self.n += n
        now = time.monotonic()
        if now - self._printed >= LINE_SECONDS:
            self._printed = now
            share, rate = self.n / max(1, self.total), tqdm.format_sizeof(self.n / (now - self._begun))
            note = f", {self._note}" if self._note else ""
            print(f"{self._what}: {share:.0%}, {rate}{self._unit}/s{note}", file=sys.stderr, flush=True)

    def set_postfix_str(self, note: str, refresh: bool = False) -> None:
        """Set a text for the next line."""
        self._note = note

    def close(self) -> None:
        """Does nothing."""

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
