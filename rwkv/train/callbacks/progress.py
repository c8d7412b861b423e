"""Report progress: a bar in a terminal, otherwise one line per minute; and once an estimate of the
remaining time.
"""

import shutil
import sys
import time
from collections import deque
from typing import Any

from tqdm import tqdm

from rwkv.train.console import BestEffortStream, duration

LINE_SECONDS = 60  # interval of lines without a terminal
_BAR = 12  # minimum width of the bar
_MEASURED = (10, 3)  # seconds and steps before the remaining time is estimated, without the first step
_WINDOW = 50  # steps of the running mean


class Speed:
    """The mean speed of the last steps. (That of one step would mislead: the longer a step takes,
    the likelier a line per minute falls into it.)
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_WINDOW)  # per token

    def add(self, tokens_per_s: float) -> float:
        """Add a step, whose speed is rounded to 0.1; returns the mean."""
        self._seconds.append(1 / max(tokens_per_s, 0.05))
        return len(self._seconds) / sum(self._seconds)


class Progress:
    """Progress of a run.

    Args:
        total: steps of the run.
        done: steps completed before this process.
        quiet: print nothing.
    """

    def __init__(self, total: int, done: int, quiet: bool = False):
        self._total, self._done, self._first, self._quiet = total, done, done, quiet
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._file = BestEffortStream(sys.stderr)
        self._bar: Any = None
        self._started = self._printed = 0.0
        self._estimated = False
        if not quiet and sys.stderr.isatty():
            bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self._bar = tqdm(
                total=total, initial=done, file=self._file, dynamic_ncols=True, bar_format=bar_format, mininterval=0.5
            )

    def step(self, loss: float | None, figures: list[str]) -> None:
        """Report a completed step.

        Args:
            loss: None if it was not finite.
            figures: texts to show after the running mean of the loss, most important first.
        """
        if self._quiet:
            return
        now, self._done = time.monotonic(), self._done + 1
        self._started = self._started or now
        if loss is not None:
            self._losses.append(loss)
        mean = sum(self._losses) / len(self._losses) if self._losses else float("nan")
        figures = [f"loss {mean:.3f}", *figures]
        if self._bar is None:
            self._print_line(now, figures)
            return
        self._bar.set_postfix_str(self._fit(figures), refresh=False)
        self._bar.update()
        left = self._seconds_left(now)
        if not self._estimated and left is not None:
            self._estimated = True
            if left > LINE_SECONDS:
                self._bar.clear()
                print(f"time: {duration(left)} left", file=self._file, flush=True)

    def _print_line(self, now: float, figures: list[str]) -> None:
        left = self._seconds_left(now)
        first_estimate = left is not None and not self._estimated and left > LINE_SECONDS
        if self._printed and not first_estimate and now - self._printed < LINE_SECONDS and self._done < self._total:
            return
        self._printed, self._estimated = now, self._estimated or left is not None
        rest = "" if left is None or self._done >= self._total else f", {duration(left)} left"
        share = f"{self._done / max(1, self._total):.0%}"
        print(
            f"{time.strftime('%H:%M:%S')} step {self._done:,} of {self._total:,} ({share}): {', '.join(figures)}{rest}",
            file=self._file,
            flush=True,
        )

    def _seconds_left(self, now: float) -> float | None:
        """Estimated remaining seconds, from the steps of this process after its first; None if
        there are too few.
        """
        steps, passed = self._done - self._first - 1, now - self._started
        if steps < 1 or passed < _MEASURED[0] or (steps < _MEASURED[1] and passed < 3 * _MEASURED[0]):
            return None
        return passed / steps * (self._total - self._done)

    def _fit(self, figures: list[str]) -> str:
        """As many figures as fit beside the bar, at least the loss."""
        width = shutil.get_terminal_size().columns
        left = width - len(f"100%|| {self._total}/{self._total} [00:00:00<00:00:00, ]") - _BAR
        shown = figures[:1]
        for figure in figures[1:]:
            if len(", ".join([*shown, figure])) > left:
                break
            shown.append(figure)
        return ", ".join(shown)

    def close(self) -> None:
        """Close the bar; later output starts on a new line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
