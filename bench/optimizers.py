"""Loss curves of a small model with AdamW in fp32, adamw8bit, and bf16 weights rounded to nearest.

    python bench/optimizers.py [--steps 2000] [--seeds 3] [--layers 3] [--width 96] [--jobs 1]
        [--kinds adam,adamw8bit,nearest,full,muon,muon-low-rank] [--rates 1e-3,2e-3]

RWKV-7, trained from scratch on the demo's documents (docstrings of Python's standard library),
bytes as tokens, matmuls in bf16. For each seed, all optimizers get the same initial weights and
batches: 8 windows of 64 bytes at random positions. Learning rate 2e-3, warm-up of 50 steps, then
cosine decay to a hundredth; weight decay 0.1; gradients clipped to norm 1. Each run is a separate
process with one thread.

- adam: fp32 weights and moments
- adamw8bit: bf16 matrices, stochastic rounding, 8-bit moments
- nearest: as adamw8bit, but weights are rounded to the nearest bf16 number
- full: as adamw8bit, but with fp32 moments
- muon: Muon for the linear layers of the blocks, AdamW for the rest, both in fp32
- muon-low-rank: as muon, and Muon also for the low-rank matrices of the time-mix

The table has the mean training loss of the last tenth of the steps, in nats per byte, and the loss
on 1024 windows after the last step, each with its difference from the first row of the seed; and
the CPU time per step.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from demo_corpus import corpus

from rwkv.adapters import lora
from rwkv.config import TrainConfig
from rwkv.kernels import adamw, load
from rwkv.models import RWKV
from rwkv.models.v7 import PARTS, Sizes
from rwkv.train.loop import muon, optimizer
from rwkv.train.loop.adamw8bit import AdamW8bit
from rwkv.train.runtime import cpu, fused_adam

T, B, RATE, WARMUP = 64, 8, 2e-3, 50
FP32 = ("adam", "muon", "muon-low-rank")


class Nearest(AdamW8bit):
    """Round to nearest: update in fp32, and convert."""

    def _update(self, p, name, group):
        if p.grad is None:
            return
        rounded = p.data
        p.data = p.data.float()
        gradient, p.grad = p.grad, None
        p.grad = gradient.float()
        super()._update(p, name, group)
        p.grad = None
        p.data = p.data.to(rounded.dtype)


def windows(text: torch.Tensor, generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.randint(len(text) - T, (count, 1), generator=generator) + torch.arange(T + 1)
    rows = text[at]
    return rows[:, :-1], rows[:, 1:]


def train(kind: str, peak: float, seed: int, steps: int, layers: int, width: int) -> list[float]:
    """The loss of every step, the loss on other windows at the end, and CPU seconds per step."""
    cpu.prepare()
    assert load.why_unavailable() is None, load.why_unavailable()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    text = torch.tensor(list("\n".join(corpus()).encode()))
    model = RWKV(Sizes(layers, width, 256, head_size=32))
    model.initialise(emb_scale=RATE, frozen=False)
    if kind not in FP32:
        for name, parameter in model.named_parameters():
            if lora.is_matrix(name, parameter.shape):
                parameter.data = parameter.data.bfloat16()
    if kind == "full":
        adamw.MIN_QUANTISED = sys.maxsize
    name = kind.split("-")[0] if kind in FP32 else "adamw8bit"
    c = TrainConfig(optimizer=name, weight_decay=0.1, random_seed=seed, precision="bf16")
    if kind == "muon-low-rank":
        hidden = lora.is_hidden
        lora.is_hidden = lambda name, shape: hidden(name, shape) or PARTS.is_low_rank(name)
    opt = optimizer.make(model, c)
    if kind == "nearest":
        opt.__class__ = Nearest
    generator, losses, begin = torch.Generator().manual_seed(seed), [], time.process_time()
    for step in range(steps):
        rate = peak * min((step + 1) / WARMUP, 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.set_rates(opt, rate, 0.1)
        losses.append(mean_loss(model, *windows(text, generator, B)))
        losses[-1].backward()
        losses[-1] = float(losses[-1].detach())
        if isinstance(opt, AdamW8bit):
            opt.set_clip(1.0)
        elif isinstance(opt, muon.Muon):
            torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
        else:
            norm = fused_adam.total_norm([p.grad for p in model.parameters() if p.grad is not None])
            opt.clip = float(torch.clamp(1 / (norm + 1e-6), max=1))
        opt.step()
        opt.zero_grad(set_to_none=True)
    seconds = (time.process_time() - begin) / steps
    generator = torch.Generator().manual_seed(1 << 20)
    with torch.no_grad():
        rest = [float(mean_loss(model, *windows(text, generator, 64))) for _ in range(16)]
    return [*losses, sum(rest) / len(rest), seconds]


def mean_loss(model: RWKV, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.head(model.hidden(x)[0], y)


def run(arguments: tuple) -> list[float]:
    words = [sys.executable, __file__, "--worker", json.dumps(arguments)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(o: argparse.Namespace) -> None:
    kinds = [(kind, float(rate)) for kind in o.kinds.split(",") for rate in o.rates.split(",")]
    jobs = [(*kind, seed, o.steps, o.layers, o.width) for seed in range(1, o.seeds + 1) for kind in kinds]
    baseline: dict[int, tuple[float, float]] = {}
    print(f"{'optimizer':14}{'rate':>8}{'seed':>5}{'last tenth':>12}{'after':>16}{'ms':>12}")
    with ThreadPoolExecutor(o.jobs) as pool:
        for (kind, rate, seed, *_), (*losses, after, seconds) in zip(jobs, pool.map(run, jobs), strict=True):
            last = losses[-max(1, len(losses) // 10) :]
            found = sum(last) / len(last), after
            first = baseline.setdefault(seed, found)
            cells = [f"{x:.4f} {x / y - 1:+.2%}" for x, y in zip(found, first, strict=True)]
            print(f"{kind:14}{rate:>8g}{seed:>5}  {'  '.join(cells)}{1000 * seconds:>8.1f}", flush=True)
    print(f"RWKV-7 L{o.layers} D{o.width}, {o.steps} steps, torch {torch.__version__}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(train(*json.loads(sys.argv[2]))))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        for flag, value in (("steps", 2000), ("seeds", 3), ("layers", 3), ("width", 96), ("jobs", 1)):
            parser.add_argument(f"--{flag}", type=int, default=value)
        parser.add_argument("--kinds", default="adam,adamw8bit,nearest")
        parser.add_argument("--rates", default=str(RATE))
        main(parser.parse_args())
