"""Histograms of document lengths, as text and as a PNG."""

from pathlib import Path

import numpy as np

from rwkv import plots

BINS = 33  # 0, then [2^(k−1), 2^k) for k = 1 … 32: lengths are 32-bit in the index
_WIDTH = 40  # of the longest bar, in characters


def count(lengths: np.ndarray) -> np.ndarray:
    """Number of lengths (tokens) per bin, int64 [BINS]."""
    return np.bincount(np.frexp(lengths.astype(np.float64))[1], minlength=BINS)


def label(k: int) -> str:
    """The lengths of bin k, as `16–31`."""
    return "0" if k == 0 else "1" if k == 1 else f"{1 << (k - 1):,}–{(1 << k) - 1:,}"


def bars(counts: np.ndarray) -> str:
    """One line per bin, from the first to the last that is not empty."""
    filled = np.flatnonzero(counts)
    rows = range(int(filled[0]), int(filled[-1]) + 1)
    left, right = max(len(label(k)) for k in rows), len(f"{int(counts.max()):,}")
    return "\n".join(
        f"  {label(k):>{left}}  {int(counts[k]):>{right},}  {'█' * -(-int(counts[k]) * _WIDTH // int(counts.max()))}"
        for k in rows
    )


def draw(counts: np.ndarray, image: Path, title: str, ctx_len: int) -> None:
    """Draw the histogram as a PNG, with the count above each bar and a line at ctx_len.

    The count axis is logarithmic if counts differ by a factor of more than 50.

    Raises:
        UserError: the disk is full, or read-only.
    """
    # 2^k is the left edge of bin k + 1; longer contexts than any document are at the right border
    filled, place = np.flatnonzero(counts), min(float(np.log2(max(1, ctx_len)) + 0.5), BINS - 0.6)
    first, last = min(int(filled[0]), round(place)), max(int(filled[-1]), round(place))
    rows = np.arange(first, last + 1)
    figure, axes = plots.new()
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    bars = axes.bar(rows, counts[rows], width=0.9, color="tab:blue")
    axes.bar_label(bars, [f"{int(n):,}" if n else "" for n in counts[rows]], fontsize="small", padding=2)
    axes.set_xticks(rows, [label(int(k)) for k in rows], rotation=45, ha="right")
    axes.set_xlim(first - 0.7, last + 0.7)
    axes.axvline(place, color="tab:orange", linewidth=2, label=f"ctx_len {ctx_len:,}")
    if counts.max() > 50 * counts[filled].min():
        axes.set_yscale("log")
        axes.set_ylim(0.7, counts.max() * 2.5)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_ylim(0, counts.max() * 1.12)
    axes.yaxis.set_major_formatter(FuncFormatter(plots.format_count))
    axes.set(xlabel="tokens in a document", ylabel="documents")
    plots.set_title(axes, title)
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper right", frameon=False)
    plots.save(figure, image)
