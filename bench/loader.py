"""Throughput of the data loader relative to what training can consume at most.

    python bench/loader.py [--ctx_len 1024] [--micro_bsz 8] [--tokens 50000000] [--peak_tflops 989]

Batches are loaded as in training (DataLoader over a memory-mapped binidx, in this process): by
prime sampling, at random, at random with resets, and by whole documents. The upper bound of
consumption is a GPU that spends all of --peak_tflops (default: an H100 in bf16) on 6 FLOPs per
parameter and token. On a GPU, batches are pinned and the copy is included.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from rwkv.data import offsets
from rwkv.data.binidx import Dataset
from rwkv.data.binidx_writer import writer
from rwkv.data.dataset import Contexts, Documents
from rwkv.data.token_stream import Stream
from rwkv.memory.parts import total
from rwkv.models.version import DEFAULT

SECONDS = 2.0  # per kind of sampling


def make_stream(prefix: Path, tokens: int) -> Stream:
    """Write a binidx with this many random tokens, and open it as a stream."""
    random, remaining = np.random.default_rng(0), tokens
    with writer(prefix) as out:
        while remaining > 0:
            length = min(remaining, int(random.integers(100, 1500)))
            out.add(random.integers(1, 60000, length).tolist())
            remaining -= length
    return Stream(Dataset(str(prefix)))


def tokens_per_second(samples, batch: int, gpu: bool) -> float:
    """Tokens/s of a data loader over these samples, with the copy to the GPU if `gpu`."""
    loader = iter(DataLoader(samples, batch, pin_memory=gpu, generator=torch.Generator()))
    next(loader)
    started, tokens = time.perf_counter(), 0
    for parts in itertools.takewhile(lambda _: time.perf_counter() - started < SECONDS, loader):
        if gpu:
            parts = [part.to("cuda", non_blocking=True) for part in parts]
        tokens += parts[0].numel()
    if gpu:
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctx_len", type=int, default=1024)
    parser.add_argument("--micro_bsz", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--peak_tflops", type=float, default=989.0)
    c = parser.parse_args()
    gpu = torch.cuda.is_available()
    required = {name: c.peak_tflops * 1e12 / (6 * total(sizes)) for name, sizes in DEFAULT.PUBLISHED.items()}
    with tempfile.TemporaryDirectory() as folder:
        stream = make_stream(Path(folder) / "data", c.tokens)
        common = {"stream": stream, "ctx_len": c.ctx_len, "samples": 1 << 30}
        prime = offsets.magic_prime(len(stream), c.ctx_len)
        kinds = {
            "prime": Contexts(**common, prime=prime),
            "random": Contexts(**common),
            "random, resets": Contexts(**common, reset=True),
            "documents, resets": Documents(**common, reset=True, min_tokens=c.ctx_len // 4),
        }
        print(
            f"T{c.ctx_len} B{c.micro_bsz}, {len(stream):,} tokens, {'pinned and copied to the GPU' if gpu else 'on a CPU'}, torch {torch.__version__}"
        )
        print("sampling            tokens/s   ms/batch   × needed for 0.1b    × 1.5b  × 13.3b")
        for name, samples in kinds.items():
            speed = tokens_per_second(samples, c.micro_bsz, gpu)
            times = [speed / required[model] for model in ("0.1b", "1.5b", "13.3b")]
            print(
                f"{name:18} {speed:10,.0f} {1e3 * c.micro_bsz * c.ctx_len / speed:10.3f} {times[0]:22.1f} {times[1]:8.0f} {times[2]:7.0f}"
            )
        print(
            f"tokens/s that {c.peak_tflops:.0f} TFLOP/s can consume at most: "
            + ", ".join(f"{name} {value:,.0f}" for name, value in required.items())
        )


if __name__ == "__main__":
    main()
