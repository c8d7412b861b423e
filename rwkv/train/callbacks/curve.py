"""Loss curves in constant memory: at most a few thousand averages, independent of the number of
steps.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CAPACITY = 4096  # maximum number of averages in a series; up to that many values are kept exactly
FEW = 40  # up to this many steps, the range of a chart contains every loss
_CUT = 3  # losses are cut off if their full range is this many times that of the usual ones
_COARSE = 512  # of series that are only looked at
_PREFERENCES = ("reward_margin", "reward_accuracy")  # of DPO's metrics, those that are drawn


class Series:
    """Averages of values by step. When there are `capacity` averages, adjacent pairs are merged,
    and each average covers twice as many values.

    Attributes:
        steps: the last step of each average.
        means, lows, highs, counts: mean, minimum, maximum and number of its values.
        rates: the learning rate at that step.
    """

    def __init__(self, capacity: int = CAPACITY):
        self.capacity = capacity
        self.steps: list[int] = []
        self.means: list[float] = []
        self.lows: list[float] = []
        self.highs: list[float] = []
        self.counts: list[int] = []
        self.rates: list[float] = []
        self._width = 1  # values in a complete average

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def width(self) -> int:
        """Number of values in a complete average."""
        return self._width

    def add(self, step: int, value: float, rate: float = 0.0) -> None:
        """Add the next value; amortised constant time."""
        if self.steps and (count := self.counts[-1] + 1) <= self._width:
            self.steps[-1], self.counts[-1], self.rates[-1] = step, count, rate
            self.means[-1] += (value - self.means[-1]) / count
            if value < self.lows[-1]:
                self.lows[-1] = value
            elif value > self.highs[-1]:
                self.highs[-1] = value
            return
        if len(self.steps) == self.capacity:
            self._halve()
            self.add(step, value, rate)  # the last average may be incomplete now
            return
        self.steps.append(step)
        self.means.append(value)
        self.lows.append(value)
        self.highs.append(value)
        self.counts.append(1)
        self.rates.append(rate)

    def _halve(self) -> None:
        counts, means = self.counts, self.means
        sums = [count * mean for count, mean in zip(counts, means, strict=True)]
        self.counts = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
        self.means = [sum(sums[2 * i : 2 * i + 2]) / count for i, count in enumerate(self.counts)]
        last = [min(i + 1, len(counts) - 1) for i in range(0, len(counts), 2)]
        self.steps, self.rates = [self.steps[i] for i in last], [self.rates[i] for i in last]
        self.lows = [min(self.lows[i : i + 2]) for i in range(0, len(self.lows), 2)]
        self.highs = [max(self.highs[i : i + 2]) for i in range(0, len(self.highs), 2)]
        self._width *= 2

    def tail(self, share: float) -> float:
        """The mean of the last `share` of all values (at least one); NaN if there are none. Exact
        up to `capacity` values.
        """
        wanted = left = max(1, int(sum(self.counts) * share))
        total = 0.0
        for count, mean in zip(reversed(self.counts), reversed(self.means), strict=True):
            taken = min(left, count)
            total, left = total + taken * mean, left - taken
            if not left:
                return total / wanted
        return math.nan


@dataclass
class Curve:
    """Summary of the lines of a run's metrics.jsonl.

    Attributes:
        loss, validation: losses by step; steps without a finite loss are omitted.
        speed, memory, norm: tokens per second, peak memory per device in bytes, and norm of the
            gradient by step.
        preferences: DPO's margin and accuracy by step, by their names in metrics.jsonl; those of
            the validation with `val_` before them.
        first_loss: of the first step; NaN before it.
        val_loss: the latest validation loss; None before the first.
        best: step and value of the lowest validation loss.
        last, tokens: the latest step, and the tokens up to it.
        count: number of lines.
    """

    loss: Series = field(default_factory=Series)
    validation: Series = field(default_factory=Series)
    speed: Series = field(default_factory=lambda: Series(_COARSE))
    memory: Series = field(default_factory=lambda: Series(_COARSE))
    norm: Series = field(default_factory=lambda: Series(_COARSE))
    preferences: dict[str, Series] = field(default_factory=dict)
    first_loss: float = math.nan
    val_loss: float | None = None
    best: tuple[int, float] | None = None
    last: int = 0
    count: int = 0
    tokens: int = 0
    _epoch: int = -1
    _sum: float = 0.0
    _values: int = 0

    def usual_range(self) -> tuple[float, float] | None:
        """The range of the losses without the first tenth of the run and the highest 0.5 %, and of
        the validation losses of that time; None if no loss is far outside it, or steps are few.
        """
        first = len(self.loss) // 10
        if len(self.loss) < FEW:
            return None
        later = zip(self.validation.steps, self.validation.means, strict=True)
        validation = [loss for step, loss in later if step >= self.loss.steps[first]]
        low = min([*self.loss.lows[first:], *validation])
        high = max([float(np.quantile(self.loss.highs[first:], 0.995)), *validation])
        return (low, high) if max(self.loss.highs) - low > _CUT * (high - low) > 0 else None

    def add(self, line: dict[str, Any], epoch: int) -> None:
        """Add a line of metrics.jsonl, of a step in this epoch; amortised constant time."""
        step, loss, val_loss = line["step"], line["loss"], line.get("val_loss")
        self.last, self.count = step, self.count + 1
        self.tokens = _number(line.get("tokens")) or self.tokens
        peaks = line.get("peak_mib")
        peak = max(map(_number, peaks.values()), default=0) if isinstance(peaks, dict) else 0
        for series, value in (
            (self.speed, line.get("tokens_per_s")),
            (self.memory, peak * 2**20),
            (self.norm, line.get("grad_norm")),
        ):
            if number := _number(value):
                series.add(step, number)
        for name in (*_PREFERENCES, *(f"val_{name}" for name in _PREFERENCES)):
            value = line.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                self.preferences.setdefault(name, Series(_COARSE)).add(step, value)
        if epoch != self._epoch:
            self._epoch, self._sum, self._values = epoch, 0.0, 0
        if loss is not None:
            if not self.loss.steps:
                self.first_loss = loss
            self._sum, self._values = self._sum + loss, self._values + 1
            self.loss.add(step, loss, line["lr"])
        if val_loss is not None:
            self.val_loss = val_loss
            self.validation.add(step, val_loss)
            if self.best is None or val_loss < self.best[1]:
                self.best = (step, val_loss)

    def epoch_mean(self) -> float:
        """The mean loss of the current epoch so far; NaN if no step had a finite loss."""
        return self._sum / self._values if self._values else math.nan


def _number(value: Any) -> Any:
    """A positive finite number; 0 for anything else."""
    return value if type(value) in (int, float) and math.isfinite(value) and value > 0 else 0
