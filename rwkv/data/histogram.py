"""Histograms of document lengths, for the terminal and as a picture."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rwkv.files import whole

BINS = 33  # 0, then [2^(k−1), 2^k) for k = 1 … 32: lengths are 32 bits in the index
_WIDTH = 40  # of the longest bar, in characters


def count(lengths: np.ndarray) -> np.ndarray:
    """How many lengths (tokens) fall into each bin, [BINS] int64."""
    return np.bincount(np.frexp(lengths.astype(np.float64))[1], minlength=BINS)


def label(k: int) -> str:
    """The lengths of bin k, as `16–31`."""
    return "0" if k == 0 else "1" if k == 1 else f"{1 << (k - 1):,}–{(1 << k) - 1:,}"


def bars(counts: np.ndarray) -> str:
    """A line for each bin from the first that holds something to the last."""
    filled = np.flatnonzero(counts)
    rows = range(int(filled[0]), int(filled[-1]) + 1)
    left, right = max(len(label(k)) for k in rows), len(f"{int(counts.max()):,}")
    return "\n".join(
        f"  {label(k):>{left}}  {int(counts[k]):>{right},}  {'█' * -(-int(counts[k]) * _WIDTH // int(counts.max()))}" for k in rows
    )


def draw(counts: np.ndarray, image: Path, title: str, ctx_len: int) -> None:
    """The same as a PNG, with a line at ctx_len."""
    filled = np.flatnonzero(counts)
    rows = np.arange(filled[0], filled[-1] + 1)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(rows, counts[rows], width=0.9, color="tab:blue")
    axes.set_xticks(rows, [label(int(k)) for k in rows], rotation=45, ha="right")
    place = np.log2(max(1, ctx_len)) + 0.5  # in bins: 2^k is the left edge of bin k + 1
    if rows[0] <= place <= rows[-1] + 1:
        axes.axvline(place, color="tab:orange", label=f"ctx_len {ctx_len}")
        axes.legend()
    axes.set(xlabel="tokens in a document", ylabel="documents", title=title.replace("$", r"\$"))
    axes.grid(alpha=0.3, axis="y")
    with whole(image) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
