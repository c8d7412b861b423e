"""Benchmark a training step against transformers + peft, and against its own matmuls alone.

    python bench/step.py [--version 4|5.2|6|7] [--sizes 12,768,65536] [--ctx_len 512]
        [--micro_bsz 1] [--rounds 5] [--free_loss 0] [--kinds lora,full] [--precisions fp32,bf16]
        [--ours] [--bf16_copies] [--profile]

Every contender runs in its own process, and they alternate step by step, so that other load affects
all of them. Same random weights, tokens and targets; LoRA r 8 on key, value and receptance of att
(after RWKV-4 on all matrices of att) with dropout 0.01, or full tuning; Adam. Weights are loaded
from disk, evicted from the page cache, in the dtype of the run: ours from a .pth, theirs with
from_pretrained and its defaults from a transformers folder (RWKV-7: of PyPI's rwkv7-hf, which make
test installs). RWKV-5.2 and 6 have no peer here, only the matmuls.

Printed: tokens/s of the best and the median step, peak resident memory of the steps after loading,
memory before loading a model (the libraries), and the loss of the first step.

The loss tensor stays alive until the next step's replaces it, as in a plain `loss = model(...)`
loop; with --free_loss 1 it is freed before, as in Lightning. On a CPU this reduces the memory of
`theirs` by up to two fifths, because of fragmentation in glibc.

`matmuls` is a loop over exactly the matmuls of our step, with the same shapes, dtype and library;
`torch matmuls` runs them with torch's `@`, in a process without our CPU settings, like `theirs`.
`ours, copies` (--bf16_copies, full tuning) is `ours` with the trainer's --bf16_copies 1.
On a GPU, also model FLOPs utilisation relative to --peak_tflops, and NVML's memory.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import step_models
import torch

from rwkv import checkpoint
from rwkv.adapters import lora
from rwkv.config import TrainConfig
from rwkv.kernels.head_loss import SLICE, chunk_tokens, head_loss
from rwkv.kernels.linear import Matrix, linear_forward, linear_grad_input, linear_grad_weight, uses_onednn
from rwkv.train.loop import optimizer
from rwkv.train.runtime import cpu

R, ALPHA, DROPOUT = 8, 32, 0.01
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def tokens(c: argparse.Namespace) -> torch.Tensor:
    return torch.randint(c.sizes[2], (c.micro_bsz, c.ctx_len + 1), generator=torch.Generator().manual_seed(1)).to(
        c.device
    )


def theirs(c: argparse.Namespace):
    """A step of transformers and peft, with the model in the run's dtype and its own loss."""
    models = step_models.THEIRS[c.version]()
    ids = tokens(c)
    c.libraries = resident(c)
    model = models.load(Path(c.folder) / "hf", DTYPES[c.precision]).to(c.device)
    if c.kind == "lora":
        model = models.adapt(model, R, ALPHA, DROPOUT)
    model.train()
    adam, loss = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4), None

    def step() -> float:
        nonlocal loss
        loss = None if c.free_loss else loss
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def ours(c: argparse.Namespace, copies: bool = False):
    """A step like rwkv.train's; `copies`: with --bf16_copies 1."""
    dtype = DTYPES[c.precision]
    ids = tokens(c)
    c.libraries = resident(c)
    adapts = c.kind == "lora"
    model = checkpoint.load_model(Path(c.folder) / "base.pth", c.device, matrices=dtype if adapts else torch.float32)
    model.grad_cp = bool(c.grad_cp)
    if c.kind == "lora":
        lora.inject(model, ["att"], R, ALPHA, DROPOUT)
        lora.mark_trainable(model, ["att"])
        lora.store_frozen(model, dtype)
    for layer in model.modules():
        if copies and isinstance(layer, Matrix):
            layer.keep_bf16_copy()
    adam, loss = optimizer.make(model, TrainConfig(lr_init=1e-4, bf16_copies=int(copies))), None

    def step() -> float:
        nonlocal loss
        loss = None if c.free_loss else loss
        with torch.autocast(c.device, dtype=torch.bfloat16, enabled=c.precision == "bf16"):
            hidden, _ = model.hidden(ids[:, :-1])
            loss = head_loss(hidden, model.head.weight, ids[:, 1:])
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def shapes(c: argparse.Namespace) -> list[tuple[int, int, int, bool, bool]]:
    """(rows, out, in, has a weight gradient, is recomputed) of every matmul of a forward pass."""
    _, width, vocab = c.sizes
    rows, full = c.micro_bsz * c.ctx_len, c.kind == "full"
    matrices = step_models.matrices(step_models.sizes(c))
    found = [(rows, out, columns, full, bool(c.grad_cp)) for out, columns in matrices]
    chunk = chunk_tokens(vocab, c.device)
    return found + [(min(chunk, rows - begin), vocab, width, full, False) for begin in range(0, rows, chunk)]


def matmuls_alone(c: argparse.Namespace, plain: bool = False):
    """Only the matmuls of our step."""
    dtype, weights = DTYPES[c.precision], {}
    work = []
    for index, (rows, out, columns, full, recomputed) in enumerate(shapes(c)):
        key = "head" if out == c.sizes[2] else index
        weight = weights.setdefault(key, torch.randn(out, columns, device=c.device).to(dtype))
        work.append(
            (
                torch.randn(rows, columns, device=c.device).to(dtype),
                torch.randn(rows, out, device=c.device).to(dtype),
                weight,
                full,
                recomputed,
            )
        )
    head = torch.empty(max(rows for rows, *_ in shapes(c)), c.sizes[2], device=c.device, dtype=dtype)

    def step() -> float:
        for x, g, weight, full, recomputed in work:
            out = head[: len(x)] if weight.shape[0] == c.sizes[2] else None
            if recomputed:
                x @ weight.t() if plain else linear_forward(x, weight)
            if plain:
                torch.mm(x, weight.t(), out=out) if out is not None else x @ weight.t()
                g @ weight
            else:
                size = SLICE if out is not None and uses_onednn(x, weight) else len(weight)
                for begin in range(0, len(weight), size):
                    part = slice(begin, begin + size)
                    linear_forward(x, weight[part]) if out is None or size < len(weight) else torch.mm(
                        x, weight.t(), out=out
                    )
                    linear_grad_input(g[:, part], weight[part])
            if full:
                g.t() @ x if plain else linear_grad_weight(g, x)
        return float("nan")

    return step


STEPS = {
    "ours": ours,
    "ours, copies": lambda c: ours(c, copies=True),
    "theirs": theirs,
    "matmuls": matmuls_alone,
    "torch matmuls": lambda c: matmuls_alone(c, plain=True),
}


def profile(c: argparse.Namespace) -> None:
    """Print the time of the operators of our step, and the share of the compiled WKV kernels."""
    with tempfile.TemporaryDirectory() as c.folder:
        c.ours, c.kind, c.precision = True, c.kinds.split(",")[0], c.precisions.split(",")[0]
        cpu.prepare()
        step_models.write(c, DTYPES[c.precision])
        step = ours(c)
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            for _ in range(c.rounds):
                step()
    averages = found.key_averages()
    print(averages.table(sort_by="self_cpu_time_total", row_limit=15))
    total = sum(x.self_cpu_time_total for x in averages)
    for part in ("forward", "backward"):
        wkv = sum(x.cpu_time_total for x in averages if re.match(rf"rwkv::wkv\d_cpu_{part}", x.key))
        print(f"{c.kind} {c.precision}: WKV {part} {100 * wkv / total:.1f} % of {total / c.rounds / 1e6:.3f} s")


def resident(c: argparse.Namespace, key: str = "VmRSS") -> float:
    """GB in use now; on a GPU those of torch's allocator, without libraries."""
    if c.device == "cuda":
        return torch.cuda.memory_allocated() / 1e9
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e9


def peak(c: argparse.Namespace) -> float:
    """Peak GB since the last `reset_peak`."""
    return torch.cuda.max_memory_allocated() / 1e9 if c.device == "cuda" else resident(c, "VmHWM")


def reset_peak(c: argparse.Namespace) -> None:
    if c.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def worker(c: argparse.Namespace) -> None:
    """Run one step for each line on stdin; print its seconds, loss, the peak memory so far and the
    GPU memory in use."""
    answers, sys.stdout = sys.stdout, sys.stderr
    c.libraries = float("nan")
    if c.worker in ("theirs", "torch matmuls"):
        torch.set_flush_denormal(True)
    else:
        cpu.prepare()
    step = STEPS[c.worker](c)
    reset_peak(c)
    print(c.libraries, file=answers, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        if c.device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps([time.perf_counter() - started, loss, peak(c), gpu_memory_used()]), file=answers, flush=True)


def gpu_memory_used() -> float:
    """GB in use on the GPU by any process; nan without a GPU."""
    if not torch.cuda.is_available():
        return float("nan")
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9


class Contender:
    """A worker process and its measurements."""

    def __init__(self, c: argparse.Namespace, name: str, kind: str, precision: str):
        self.name, self.kind, self.precision = name, kind, precision
        self.times, self.loss, self.memory = [], float("nan"), 0.0
        arguments = ["--worker", name, "--kind", kind, "--precision", precision, "--sizes", ",".join(map(str, c.sizes))]
        arguments += ["--folder", str(Path(c.folder) / precision)]
        for flag in ("version", "ctx_len", "micro_bsz", "grad_cp", "free_loss", "device"):
            arguments += [f"--{flag}", str(getattr(c, flag))]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.libraries = float(self._answer())

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ({self.kind}, {self.precision}) exited with {self.process.wait()}")
        return line

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, loss, self.memory, self.used = json.loads(self._answer())
        if not self.times:
            self.loss = loss
        self.times.append(seconds)

    @property
    def timed(self) -> list[float]:
        """Seconds of every step but the first, which is a warm-up."""
        return self.times[1:] or self.times

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(c: argparse.Namespace) -> list[Contender]:
    """Run every contender for the requested kinds and precisions."""
    contenders = []
    with tempfile.TemporaryDirectory() as c.folder:
        for precision in c.precisions.split(","):
            folder = Path(c.folder) / precision
            folder.mkdir()
            given = [
                *("--version", c.version),
                *("--sizes", ",".join(map(str, c.sizes))),
                *("--ctx_len", str(c.ctx_len)),
                *("--precision", precision),
                *("--folder", str(folder)),
            ]
            subprocess.run(
                [sys.executable, __file__, "--worker", "write", *given, *(["--ours"] if c.ours else [])], check=True
            )
        for kind in c.kinds.split(","):
            peer = ["theirs"] if c.version in step_models.THEIRS else []
            names = ["ours"] if c.ours else ["ours", "matmuls", "torch matmuls", *peer]
            if c.bf16_copies and kind == "full":
                names.insert(1, "ours, copies")
            group = [Contender(c, name, kind, precision) for precision in c.precisions.split(",") for name in names]
            for _ in range(c.rounds):
                for contender in group:
                    contender.step()
            for contender in group:
                contender.close()
            contenders += group
    return contenders


def print_table(c: argparse.Namespace, contenders: list[Contender]) -> None:
    count = c.micro_bsz * c.ctx_len
    layers, width, vocab = c.sizes
    cores = f"{torch.get_num_threads()} threads" if c.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"L{layers} D{width} V{vocab} T{c.ctx_len} B{c.micro_bsz}{' grad_cp' if c.grad_cp else ''}{' free_loss' if c.free_loss else ''}, {cores}, torch {torch.__version__}, {c.rounds} steps each"
    )
    print("kind  dtype  contender        tokens/s  (median)   s/step  GFLOP/s  peak GB  libraries  first loss")
    found = {}
    for x in contenders:
        best, median = min(x.timed), statistics.median(x.timed)
        found[x.kind, x.precision, x.name] = x
        flops = sum(
            2 * rows * out * columns * (2 + full + recomputed)
            for rows, out, columns, full, recomputed in shapes(argparse.Namespace(**{**vars(c), "kind": x.kind}))
        )
        gpu = f"  MFU {flops / best / c.peak_tflops / 1e10:.1f} %, {x.used:.2f} GB in use" if c.device == "cuda" else ""
        print(
            f"{x.kind:5} {x.precision:6} {x.name:15} {count / best:9.1f} {count / median:9.1f} {best:9.3f} {flops / best / 1e9:8.0f}"
            f" {x.memory:8.2f} {x.libraries:10.2f}  {x.loss:.4f}{gpu}"
        )
    for (kind, precision, name), x in found.items():
        if name == "ours, copies":
            plain = found[kind, precision, "ours"]
            ratio = statistics.median(one / other for one, other in zip(x.timed, plain.timed, strict=True))
            print(
                f"{kind} {precision}: with copies {ratio:.3f} of the time of a step (median of pairs), losses differ by {abs(x.loss - plain.loss):.1e}"
            )
    for kind, precision in dict.fromkeys((k, p) for k, p, name in found if name == "matmuls"):
        ours, theirs, matmuls, torch_matmuls = (
            found.get((kind, precision, name)) for name in ("ours", "theirs", "matmuls", "torch matmuls")
        )
        if theirs:
            print(
                f"{kind} {precision}: {min(theirs.timed) / min(ours.timed):.1f} × theirs, {ours.memory / theirs.memory:.2f} of its memory ({(ours.memory - ours.libraries) / (theirs.memory - theirs.libraries):.2f} without libraries), losses differ"
                f" by {abs(ours.loss - theirs.loss):.1e}"
            )
        print(
            f"{kind} {precision}: {100 * min(matmuls.timed) / min(ours.timed):.0f} % of the speed of its matmuls, {100 * min(torch_matmuls.timed) / min(ours.timed):.0f} % of torch's"
        )
    for kind in c.kinds.split(","):
        ours, theirs = found.get((kind, "bf16", "ours")), found.get((kind, "fp32", "theirs"))
        if ours and theirs:
            print(
                f"{kind} bf16 against their default, fp32: {min(theirs.timed) / min(ours.timed):.1f} ×, {ours.memory / theirs.memory:.2f} of its memory, losses differ by {abs(ours.loss - theirs.loss):.1e}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=lambda text: tuple(map(int, text.split(","))), default=(12, 768, 65536), help="L,D,V"
    )
    parser.add_argument("--version", choices=["4", "5.2", "6", "7"], default="4")
    parser.add_argument("--ctx_len", type=int, default=512)
    parser.add_argument("--micro_bsz", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grad_cp", type=int, default=0)
    parser.add_argument("--free_loss", type=int, default=0, help="1: free the loss before the next step")
    parser.add_argument("--kinds", default="lora,full")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--ours", action="store_true", help="run only our implementation")
    parser.add_argument("--bf16_copies", action="store_true", help="also run ours with the trainer's --bf16_copies 1")
    parser.add_argument("--profile", action="store_true", help="print the operators of our step, and the share of WKV")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="peak of the GPU in bf16 (default: H100)")
    parser.add_argument("--worker", choices=[*STEPS, "write"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="lora", help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    c = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    if c.worker == "write":
        step_models.write(c, DTYPES[c.precision])
    elif c.worker:
        worker(c)
    elif c.profile:
        profile(c)
    else:
        print_table(c, compare(c))


if __name__ == "__main__":
    main()
