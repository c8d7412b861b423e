"""Draw loss.png: loss, validation loss and learning rate by step."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rwkv import plots
from rwkv.train.callbacks.curve import FEW, Curve, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(curve: Curve, image: Path, title: str, unit: str = "nats per token") -> None:
    """Draw the loss of every step, its moving mean, the learning rate, and the validation loss with
    its best value.

    For more than a few thousand steps, ranges and means of neighbouring steps are drawn. Losses of
    the first or of single steps that are much larger than the rest are cut off, with a note.

    Raises:
        UserError: the disk is full, or read-only.
    """
    figure, axes = plots.new()
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    loss, steps = curve.loss, np.array(curve.loss.steps)
    mean, window = _moving_mean(loss)
    if window > 1:
        axes.fill_between(steps, loss.lows, loss.highs, color="tab:blue", alpha=0.2, linewidth=0)
        axes.plot(steps, loss.means, color="tab:blue", alpha=0.35, linewidth=1, label="loss of a step")
        axes.plot(
            steps[len(steps) - len(mean) :], mean, color="tab:blue", linewidth=2, label=f"mean of {window:,} steps"
        )
    else:
        axes.plot(steps, loss.means, color="tab:blue", marker="o", markersize=3, linewidth=1.5, label="loss of a step")
    if curve.best:
        few = len(curve.validation) <= FEW
        axes.plot(
            curve.validation.steps,
            curve.validation.means,
            color="tab:green",
            marker="o" if few else "",
            markersize=4,
            label="validation loss",
        )
        best, name = curve.best, "best validation loss"
    elif len(mean):
        at = int(np.argmin(mean))
        best, name = (
            (int(steps[len(steps) - len(mean) + at]), float(mean[at])),
            "lowest mean" if window > 1 else "lowest loss",
        )
    if curve.best or len(mean):
        axes.plot(
            *best,
            linestyle="",
            marker="*",
            markersize=11,
            color="tab:red",
            label=f"{name}: {best[1]:.3f}, step {best[0]:,}",
            zorder=5,
        )
    _limit(axes, curve)
    axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})")
    plots.set_title(axes, title)
    if len(steps) < 2:
        axes.set_xlim(curve.last - 1, curve.last + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(plots.format_count))
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(steps, loss.rates, color="tab:orange", linewidth=1, label="learning rate")
    right.set_ylabel("learning rate")
    right.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))
    right.set_ylim(0, max([*loss.rates, 0.0]) * 1.1 or 1)
    axes.set_zorder(right.get_zorder() + 1)  # the loss in front of the rate
    axes.patch.set_visible(False)
    figure.legend(
        handles=[*axes.lines, *right.lines], loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )
    plots.save(figure, image)


def _moving_mean(loss: Series) -> tuple[np.ndarray, int]:
    """The moving mean over a twentieth of the run, and its window in steps."""
    if not len(loss):
        return np.zeros(0), 1
    width = max(1, len(loss) // 20)
    counts = np.array(loss.counts, dtype=np.float64)
    sums, before = (np.concatenate([[0.0], np.cumsum(x)]) for x in (counts * loss.means, counts))
    return (sums[width:] - sums[:-width]) / (before[width:] - before[:-width]), width * loss.width


def _limit(axes: "Axes", curve: Curve) -> None:
    """Set the limits of the loss axis, cutting off the first or single steps if they are much
    larger than the rest.
    """
    found = curve.usual_range()
    if found:
        low, high = found
        space = (high - low) * 0.08
        axes.set_ylim(low - space, high + space)
        highest = int(np.argmax(curve.loss.highs))
        which = "the first steps" if highest < len(curve.loss) // 10 else f"near step {curve.loss.steps[highest]:,}"
        text = f"↑ {which}: up to {curve.loss.highs[highest]:.3g}"
        axes.annotate(text, (0.01, 0.97), xycoords="axes fraction", va="top", fontsize="small", color="tab:blue")
