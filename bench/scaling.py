"""Time and memory of a LoRA step against context length, batch and layers, and their plot.

    python bench/scaling.py [PNG]

bf16, D512 V65536; from L6 T1024 B1 one of T, B, L is varied. A process per point; time is the best of three steps after one, memory the peak
resident of the steps less that of a step of 64 tokens, which is the model and torch itself. Printed beside: the ratio to a straight line through
the first point, in time per token and layer's work, and in memory per token.
"""

import argparse
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from step import Contender

VARIED = {"ctx_len": (512, 1024, 2048, 4096, 8192, 16384), "micro_bsz": (1, 2, 4, 8, 16), "layers": (3, 6, 12, 24)}
NAMES = {"ctx_len": "context length T (tokens)", "micro_bsz": "batch B", "layers": "layers L"}


def measure(ctx_len: int, micro_bsz: int, layers: int, rounds: int) -> tuple[float, float]:
    """Seconds and peak GB of a step."""
    c = argparse.Namespace(sizes=(layers, 512, 65536), ctx_len=ctx_len, micro_bsz=micro_bsz, grad_cp=0, device="cpu")
    contender = Contender(c, "ours", "lora", "bf16")
    for _ in range(1 + rounds):
        contender.step()
    contender.close()
    return min(contender.times[1:]), contender.memory


def main(png: str) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), layout="constrained" if hasattr(plt.Figure, "get_layout_engine") else None)
    for column, (name, values) in enumerate(VARIED.items()):
        points = []
        for value in values:
            at = {"ctx_len": 1024, "micro_bsz": 1, "layers": 6, name: value}
            seconds, peak = measure(**at, rounds=3)
            floor = measure(64, 1, at["layers"], rounds=1)[1]
            points.append((seconds, peak - floor))
            tokens = at["ctx_len"] * at["micro_bsz"]
            print(
                f"T{at['ctx_len']:6} B{at['micro_bsz']:3} L{at['layers']:3}: {seconds:8.3f} s {1e3 * seconds / tokens:7.3f} ms/token"
                f" {1e3 * (peak - floor):8.0f} MB {1e6 * (peak - floor) / tokens:7.1f} kB/token   (peak {peak:.2f} GB)",
                flush=True,
            )
        for row, (label, unit) in enumerate((("time of a step", "s"), ("memory beside the model", "GB"))):
            axis = axes[row][column]
            axis.plot(values, [point[row] for point in points], "o-")
            axis.plot(values, [points[-1][row] * value / values[-1] for value in values], ":", color="gray", label="in proportion")
            axis.set(xscale="log", yscale="log", xlabel=NAMES[name], ylabel=f"{label} ({unit})")
            axis.set_xticks(values, [str(value) for value in values])
            axis.minorticks_off()
    axes[0][0].legend()
    figure.suptitle("LoRA step, bf16, D512 V65536, from L6 T1024 B1")
    figure.savefig(png, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["bench/scaling.png"])
