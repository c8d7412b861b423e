"""What a training step on a CPU takes against what rwkv.memory predicts, part by part, for the published sizes.

    python bench/memory.py [MODEL,METHOD,PRECISION,GRAD_CP,CTX_LEN,OPTIMIZER ...]

E.g. 1.5b,lora,bf16,1,1024,adam; without arguments the rows of ROWS, the largest of which wants 17 GB. A process per row; random weights, tokens,
three steps. Each cell is the prediction in GB and what was measured as a percentage of it: of weights, gradients and optimizer the bytes of the
tensors; of what a forward pass keeps, and of the phases' peaks, the record that torch's profiler has of the allocator, in the last step; `resident`
the peak of the process in the second, less what it had before there was a model.
"""

import argparse
import json
import subprocess
import sys

import torch
from step import DTYPES, build, tokens
from torch.profiler import ProfilerActivity, profile

from rwkv import limits, lora, memory
from rwkv.config import TrainConfig
from rwkv.train import cpu, optimizer

ROWS = (
    "0.1b,lora,fp32,0,1024,adam", "0.1b,lora,bf16,0,1024,adam", "0.1b,lora,bf16,1,1024,adam",
    "0.1b,full,fp32,0,512,adam", "0.1b,full,bf16,0,1024,adam", "0.1b,full,bf16,1,1024,adafactor",
    "0.4b,lora,fp32,0,512,adam", "0.4b,lora,bf16,0,1024,adam", "0.4b,lora,bf16,1,1024,adam",
    "0.4b,full,bf16,0,512,adam", "0.4b,full,bf16,1,1024,adam", "0.4b,full,bf16,1,1024,adafactor",
    "1.5b,lora,bf16,0,512,adam", "1.5b,lora,bf16,1,512,adam", "1.5b,lora,bf16,1,1024,adam", "1.5b,full,bf16,1,512,adafactor",
)  # fmt: skip
TENSORS, PHASES = ("weights", "gradients", "optimizer", "kept"), ("forward", "backward", "optimizer")


def plan_of(row: str) -> memory.Plan:
    model, method, precision, grad_cp, ctx_len, kind = row.split(",")
    sizes = memory.sizes_of(model)
    return memory.Plan(
        sizes, method == "lora", precision=precision, grad_cp=grad_cp == "1", ctx_len=int(ctx_len), optimizer=kind, gpu=False
    )


def bytes_of(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if torch.is_tensor(x))


def measure(p: memory.Plan) -> dict:
    """Bytes of the parts and phases of a step, as rwkv.train makes it."""
    cpu.prepare()
    resting, s = limits.rss(), p.sizes
    c = argparse.Namespace(
        sizes=(s.n_layer, s.n_embd, s.vocab_size), grad_cp=p.grad_cp, ctx_len=p.ctx_len, micro_bsz=p.micro_bsz, device="cpu"
    )
    model = build(c, DTYPES[p.precision] if p.lora else torch.float32)
    if p.lora:
        lora.inject(model, p.parts, p.r, 2 * p.r, 0.01)
        lora.mark_trainable(model, p.parts)
        lora.store_frozen(model, torch.bfloat16 if p.frozen == 2 else torch.float32)
    made = optimizer.make(model, TrainConfig(optimizer=p.optimizer, lr_init=1e-5))
    ids, loss, found = tokens(c), [], {"weights": bytes_of(model.parameters())}

    def forward() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=p.precision == "bf16"):
            loss.append(model.head(model.hidden(ids[:, :-1])[0], ids[:, 1:]))

    def step(watched) -> None:
        watched("forward", forward)
        watched("backward", lambda: loss.pop().backward())
        found["gradients"] = bytes_of(x.grad for x in model.parameters())
        watched("optimizer", made.step)
        watched("end", lambda: made.zero_grad(set_to_none=True))

    step(lambda name, work: work())
    found["optimizer"] = bytes_of(x for state in made.state.values() for x in state.values())
    limits.rss_peak(restart=True)
    step(lambda name, work: work())
    found["resident"] = limits.rss_peak() - resting
    now = begin = found["weights"] + found["optimizer"] + bytes_of([ids])
    phases = {}

    def traced(name: str, work) -> None:
        nonlocal now
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        top = now
        for event in sorted(events, key=lambda event: event.start_ns() if hasattr(event, "start_ns") else event.start_us()):
            now += event.nbytes()
            top = max(top, now)
        phases[name] = top
        if name == "forward":
            found["kept"] = now - begin

    step(traced)
    return found | {"phases": phases, "threads": torch.get_num_threads(), "torch": torch.__version__}


def main(rows: list[str]) -> None:
    heads = ["weights", "gradients", "optimizer", "kept", *(f"peak {name}" for name in PHASES), "peak", "resident"]
    print(f"{'':34}" + "".join(f"{head:>17}" for head in heads))
    for row in rows:
        done = subprocess.run([sys.executable, __file__, "--worker", row], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{row:34}  ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        found, p = json.loads(done.stdout.splitlines()[-1]), plan_of(row)
        ahead = memory.estimate(p)
        first, last = ahead.phase_parts["forward"], ahead.phase_parts["optimizer"]
        predicted = [first["weights"], last["gradients"], first["optimizer"], first["activations"] + first["gradients"]]
        predicted += [ahead.tensors[name] for name in PHASES]
        measured = [found[name] for name in TENSORS] + [found["phases"][name] for name in PHASES]
        predicted += [max(ahead.tensors.values()), ahead.total - p.process + memory.LOADED]
        measured += [max(found["phases"].values()), found["resident"]]
        print(f"{row:34}" + "".join(f"{x / 1e9:10.3f} {y / max(1, x):5.0%} " for x, y in zip(predicted, measured, strict=True)), flush=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(plan_of(sys.argv[2]))))
    else:
        main(sys.argv[1:] or [*ROWS])
