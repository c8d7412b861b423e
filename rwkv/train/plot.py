"""loss.png: the loss and the learning rate of a run, from its metrics.jsonl."""

import json
import warnings
from pathlib import Path

import numpy as np

from rwkv.files import whole


def plot(metrics: Path, image: Path, title: str) -> None:
    """Draw the loss of every step, its running mean over a twentieth of the run, the learning rate, and the held-out loss where there is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*smallest subnormal.*")  # numpy asks what they are, and training has none
        from matplotlib.figure import Figure  # 25 MB: only when a run has ended

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["loss"] is not None]  # steps that --on_nan skip left out
    held_out = [(line["step"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]
    steps, losses, rates = (np.array([line[key] for line in lines]) for key in ("step", "loss", "lr"))
    width = max(1, len(steps) // 20)
    smooth = np.convolve(losses, np.ones(width) / width, "valid") if lines else losses
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", linewidth=2, label=f"mean of {width}")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:green", marker="o", markersize=4, linewidth=1.5, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title.replace("$", r"\$"))
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(steps, rates, color="tab:orange", linewidth=1, label="learning rate")
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    axes.legend(handles=[*axes.lines, *right.lines], loc="upper right")
    with whole(image) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
