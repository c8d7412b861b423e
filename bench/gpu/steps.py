"""Benchmark training steps on a GPU: time, MFU, and peak memory relative to the prediction.

    python bench/gpu/steps.py [--json FILE] [--only TEXT] [--device cpu --tiny]

Weights and tokens are random. A step is forward, backward, clipping and Adam, in bf16 autocast.
Printed for each row:
- ms: median of steps with a synchronisation after each; host: until the host has started a step
- ahead: per step without synchronisation, as in training; tokens/s and MFU are of this time
- MFU: operations of the matmuls (without recomputation) over the speed of a large bf16 matmul
- peak: of torch's allocator, and the prediction of rwkv.memory.estimate for it. With a graph it is
  reserved memory: what the graph holds is not counted as allocated
`graph`: the blocks run from a CUDA graph, as in training by default.
"""

import argparse
import collections
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import matmul_speed
from torch.profiler import ProfilerActivity, profile

from rwkv.adapters import lora
from rwkv.config import TrainConfig
from rwkv.kernels import quant
from rwkv.kernels.head_loss import head_loss
from rwkv.kernels.linear import Matrix
from rwkv.memory import estimate
from rwkv.memory.parts import matrices
from rwkv.memory.plan import Plan
from rwkv.models import RWKV
from rwkv.models.version import named, published
from rwkv.train.loop import optimizer
from rwkv.train.loop.cuda_graph import GraphedBlocks
from rwkv.train.runtime import fused_adam

LARGEST = ("gemm", "cutlass", "nvjet", "cublas", "splitk", "gemv")  # in the names of matmul kernels


class Row(NamedTuple):
    name: str
    version: str
    model: str
    kind: str
    batch: int
    tokens: int = 1024
    vocab: int = 65536
    dropout: float = 0.01
    grad_cp: bool = False
    graph: bool = False
    profiled: bool = False
    base: str = "bf16"  # --lora_base
    copies: bool = False  # --bf16_copies


ROWS = (
    Row("1.5b LoRA B8", "4", "1.5b", "lora", 8, profiled=True),
    Row("1.5b LoRA B8, graph", "4", "1.5b", "lora", 8, graph=True),
    Row("1.5b LoRA B8, graph, no dropout", "4", "1.5b", "lora", 8, dropout=0, graph=True),
    Row("1.5b LoRA B8, graph, no dropout, --grad_cp 1", "4", "1.5b", "lora", 8, dropout=0, grad_cp=True, graph=True),
    Row("1.5b LoRA B1", "4", "1.5b", "lora", 1, profiled=True),
    Row("1.5b LoRA B1, graph", "4", "1.5b", "lora", 1, graph=True),
    Row("0.1b full B8", "4", "0.1b", "full", 8, profiled=True),
    Row("0.1b full B8, graph", "4", "0.1b", "full", 8, graph=True),
    Row("7b LoRA B4, graph", "4", "7b", "lora", 4, graph=True),
    Row("7b LoRA B1, graph", "4", "7b", "lora", 1, graph=True),
    Row("1.5b full B1, graph", "4", "1.5b", "full", 1, graph=True),
    Row("0.1b LoRA B8, graph", "4", "0.1b", "lora", 8, graph=True),
    Row("RWKV-7 0.1b LoRA B8", "7", "0.1b", "lora", 8, profiled=True),
    Row("RWKV-7 0.1b LoRA B8, graph", "7", "0.1b", "lora", 8, graph=True),
    Row("RWKV-7 1.5b LoRA B1, graph", "7", "1.5b", "lora", 1, graph=True),
    Row("RWKV-7 1.5b LoRA B4, graph", "7", "1.5b", "lora", 4, graph=True),
    Row("RWKV-6 1.6b LoRA B1, graph", "6", "1.6b", "lora", 1, graph=True),
    Row("1.5b LoRA B8, graph, nf4", "4", "1.5b", "lora", 8, graph=True, base="nf4"),
    Row("1.5b LoRA B8, graph, fp8", "4", "1.5b", "lora", 8, graph=True, base="fp8"),
    Row("0.1b full B8, copies", "4", "0.1b", "full", 8, copies=True),
    Row("0.1b full B8, graph, copies", "4", "0.1b", "full", 8, graph=True, copies=True),
)


def random_model(row: Row, sizes: Any, device: str) -> RWKV:
    """A model with random weights, made on the device; matrices in bf16 for LoRA, or quantised."""
    model = RWKV(sizes, row.grad_cp, device="meta")
    generator = torch.Generator(device).manual_seed(0)
    special = {"weight": 1.0, "bias": 0.0, "time_first": -1.2}
    for name, parameter in list(model.named_parameters()):
        matrix = lora.is_matrix(name, parameter.shape)
        dtype = torch.bfloat16 if matrix and row.kind == "lora" else torch.float32
        value = torch.empty(parameter.shape, device=device, dtype=dtype)
        if value.dim() == 2:
            value.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        elif "decay" in name:
            value.copy_(torch.linspace(-5, 3, value.numel(), device=device).view_as(value))
        else:
            value.fill_(special.get(name.split(".")[-1], 0.5))
        module, _, leaf = name.rpartition(".")
        layer: Any = model.get_submodule(module)
        if row.base in quant.KINDS and lora.is_quantisable(name, value.shape):
            layer.set_quantised(quant.KINDS[row.base](value.cpu()).to(device))
            continue
        setattr(layer, leaf, torch.nn.Parameter(value))
        if row.copies and isinstance(layer, Matrix):
            layer.keep_bf16_copy()
    if row.kind == "lora":
        lora.inject(model, ["att"], 8, 32, row.dropout)
        lora.mark_trainable(model, ["att", "ln", "time"])
        model.to(device)
    return model


def operations(row: Row, sizes: Any) -> float:
    """Operations of a step's matmuls, without recomputation and adapters."""
    shapes = {name: shape.numel() for name, shape in matrices(sizes).items() if not name.startswith("emb")}
    return 2.0 * row.batch * row.tokens * sum(shapes.values()) * (3 if row.kind == "full" else 2)


def kernel_times(step: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """GPU milliseconds and launches of a step by kind of kernel."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        step()
        torch.cuda.synchronize()
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in profiled.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        name = event.name.lower()
        if event.name.startswith(("wkv", "fused_")):
            kind = event.name.split("<")[0].split("(")[0]
        elif any(word in name for word in LARGEST):
            kind = "matmuls"
        else:
            kind = "Adam" if "adam" in name else "copies" if name.startswith(("memcpy", "memset")) else "other torch"
        times[kind] += event.time_range.elapsed_us() / 1e3
        counts[kind] += 1
    return {kind: (ms, counts[kind]) for kind, ms in times.most_common()}


def measure(row: Row, device: str, tiny: bool, peak: float, steps: int = 6) -> dict[str, Any]:
    on_gpu, synchronize = device == "cuda", torch.cuda.synchronize if device == "cuda" else (lambda: None)
    version = named(row.version)
    sizes = published(row.model, version)
    sizes = type(sizes)(**{**vars(sizes), "vocab_size": row.vocab})
    if tiny:
        sizes, row = (
            version.Sizes(n_layer=2, n_embd=64, vocab_size=128, dim_ffn=256),
            row._replace(tokens=32, vocab=128),
        )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = random_model(row, sizes, device)
    adam = optimizer.make(model, TrainConfig(lr_init=1e-5, bf16_copies=int(row.copies)))
    ids = torch.randint(row.vocab, (row.batch, row.tokens + 1), device=device)
    trained = [p for p in model.parameters() if p.requires_grad]

    blocks = GraphedBlocks(model) if row.graph else lambda tokens: model.hidden(tokens)[0]

    def step() -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            hidden = blocks(ids[:, :-1])
            loss = head_loss(hidden, model.head.weight, ids[:, 1:])
        loss.backward()
        if hasattr(adam, "grad_scale"):  # torch's fused Adam
            fused_adam.set_clip(adam, 1.0)
        else:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.detach()

    for _ in range(3):
        first = step()
    synchronize()
    times, host = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        host.append(time.perf_counter() - begin)
        synchronize()
        times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    ahead = (time.perf_counter() - begin) / steps
    peak_memory = torch.cuda.max_memory_reserved if row.graph else torch.cuda.max_memory_allocated
    plan = Plan(
        sizes,
        row.kind == "lora",
        ctx_len=row.tokens,
        micro_bsz=row.batch,
        grad_cp=row.grad_cp,
        gpu=on_gpu,
        graph=row.graph,
        base=row.base,
        bf16_copies=row.copies,
    )
    found = {
        **row._asdict(),
        "ms": 1e3 * statistics.median(times),
        "host_ms": 1e3 * statistics.median(host),
        "ahead_ms": 1e3 * ahead,
        "tokens_per_s": row.batch * row.tokens / ahead,
        "mfu": operations(row, sizes) / ahead / peak,
        "loss": float(first),
        "peak_gb": peak_memory() / 1e9 if on_gpu else 0.0,
        "predicted_gb": max(estimate.estimate(plan).tensors.values()) / 1e9,
    }
    if row.profiled and on_gpu:
        found["kernels"] = kernel_times(step)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file, after each row")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to test this program")
    parser.add_argument("--tiny", action="store_true", help="tiny models: to test this program")
    c = parser.parse_args()
    peak = matmul_speed() if c.device == "cuda" else 1e12
    print(f"a large bf16 matmul: {peak / 1e12:.0f} TFLOP/s", flush=True)
    results: list[dict[str, Any]] = []
    for row in ROWS:
        if c.only not in row.name or (row.graph and c.device == "cpu"):
            continue
        try:
            found = measure(row, c.device, c.tiny, peak)
        except Exception as error:  # a row that fails does not end the others
            print(f"{row.name:46} {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
            found = row._asdict() | {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        else:
            print(
                f"{row.name:46} {found['ms']:8.2f} ms, host {found['host_ms']:7.2f}, ahead {found['ahead_ms']:8.2f}:"
                f" {found['tokens_per_s']:9,.0f} tokens/s, MFU {100 * found['mfu']:4.1f} %;"
                f" peak {found['peak_gb']:.2f} of {found['predicted_gb']:.2f} GB; loss {found['loss']:.3f}",
                flush=True,
            )
            if "kernels" in found:
                parts = (f"{kind} {ms:.2f} ({count})" for kind, (ms, count) in found["kernels"].items())
                print(f"    GPU ms (launches): {', '.join(parts)}", flush=True)
        results.append(found)
        if c.device == "cuda":
            gc.collect()  # a CUDA graph and its model refer to each other
            torch.cuda.empty_cache()
        if c.json:
            c.json.write_text(json.dumps({"matmul_tflops": peak / 1e12, "rows": results}))


if __name__ == "__main__":
    main()
