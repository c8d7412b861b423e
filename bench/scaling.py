"""Time and memory of a LoRA step on a CPU as functions of context length, batch and layers.

    python bench/scaling.py [--png bench/scaling.png] [--width 512] [--most 16384] [--rounds 3]

bf16, V65536; starting from L6 T1024 B1, one of T, B and L is varied. Each point runs in its own
process. Time is the best of `rounds` steps after a warm-up step; memory is the peak during the
steps less the process' memory before them, model included. For each variable the line a + b x with
the smallest relative errors is fitted; its largest error shows how linear the cost is. Writes a
plot. Quick run: --width 128 --most 2048 --rounds 1.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from memory import Step

from rwkv.memory import machine
from rwkv.memory.plan import Plan
from rwkv.models.v4 import Sizes
from rwkv.train.runtime import cpu

VARIED = {"ctx_len": (512, 1024, 2048, 4096, 8192, 16384), "micro_bsz": (1, 2, 4, 8, 16), "layers": (3, 6, 12, 24)}
NAMES = {"ctx_len": "context length T (tokens)", "micro_bsz": "batch B", "layers": "layers L"}
COSTS = ("time of a step (s)", "memory of a step (GB)")
START = {"ctx_len": 1024, "micro_bsz": 1, "layers": 6}


def worker(width: int, ctx_len: int, micro_bsz: int, layers: int, rounds: int) -> tuple[float, float]:
    """Seconds and GB of a step, in this process."""
    cpu.prepare()
    plan = Plan(Sizes(layers, width, 65536, width, 4 * width), ctx_len=ctx_len, micro_bsz=micro_bsz, gpu=False)
    step = Step(plan)
    before, times = machine.rss(), []
    machine.rss_peak(restart=True)
    for _ in range(1 + rounds):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return min(times[1:]), (machine.rss_peak() - before) / 1e9


def measure(width: int, rounds: int, at: dict[str, int]) -> list[float]:
    """`worker` in a separate process."""
    numbers = [str(number) for number in (width, *at.values(), rounds)]
    done = subprocess.run(
        [sys.executable, __file__, "--worker", *numbers], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{at} exited with {done.returncode}")
    return json.loads(done.stdout)


def fit_line(values: tuple[int, ...], costs: list[float]) -> tuple[float, float, float]:
    """a, b of cost = a + b · value by least squares of relative errors, and the largest error."""
    x, y = np.array(values, float), np.array(costs)
    a, b = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(y)), rcond=None)[0]
    return float(a), float(b), float(np.abs((a + b * x) / y - 1).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", default=str(Path(__file__).with_suffix(".png")))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--most", type=int, default=16384, help="tokens of the largest step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", type=int, nargs=5, help=argparse.SUPPRESS)
    c = parser.parse_args()
    if c.worker:
        print(json.dumps(worker(*c.worker)))
        return
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), constrained_layout=True)
    measured = {}
    for column, (name, every) in enumerate(VARIED.items()):
        points = [START | {name: value} for value in every]
        points = [at for at in points if at["ctx_len"] * at["micro_bsz"] <= c.most]
        values = tuple(at[name] for at in points)
        for at in points:
            key = tuple(at.values())
            measured[key] = measured.get(key) or measure(c.width, c.rounds, at)
            seconds, gigabytes = measured[key]
            tokens = at["ctx_len"] * at["micro_bsz"]
            print(
                f"T{at['ctx_len']:6} B{at['micro_bsz']:3} L{at['layers']:3}: {seconds:8.3f} s {1e3 * seconds / tokens:7.3f} ms/token"
                f" {1e3 * gigabytes:8.0f} MB {1e6 * gigabytes / tokens:7.1f} kB/token",
                flush=True,
            )
        for row, label in enumerate(COSTS):
            costs = [measured[tuple(at.values())][row] for at in points]
            a, b, error = fit_line(values, costs)
            print(f"{label} against {NAMES[name]}: {a:.3g} + {b:.3g} x, largest error {error:.0%}")
            axis = axes[row][column]
            axis.plot(values, costs, "o")
            axis.plot(values, [a + b * value for value in values], "-")
            axis.set_title(f"{a:.2g} + {b:.2g} x, ±{error:.0%}", fontsize=9)
            axis.set(xscale="log", yscale="log", xlabel=NAMES[name], ylabel=label)
            axis.set_xticks(values)
            axis.set_xticklabels([str(value) for value in values], fontsize=8)
            axis.set_yticks(costs)
            axis.set_yticklabels([f"{cost:.2g}" for cost in costs], fontsize=8)
            axis.minorticks_off()
    figure.suptitle(f"LoRA step on a CPU, bf16, D{c.width} V65536, from L6 T1024 B1")
    figure.savefig(c.png, dpi=80)
    print(c.png)


if __name__ == "__main__":
    main()
