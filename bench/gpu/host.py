"""Count what the host does in a block of a training step, and time it, without a GPU.

    python bench/gpu/host.py [--rounds N] [--only TEXT]

Tensors are tiny, so the time is that of Python, autograd and calls; on a GPU a launch costs about
what such a call costs on a CPU. Every number is of forward and backward, in bf16 autocast, and per
block: the difference of models with 12 and 4 layers, divided by 8.
- us: least CPU time of a step, one thread
- kernels: operations of torch that launch a kernel on a GPU; of these casts: copies to another
  dtype
- ours: operators of torch.ops.rwkv, each of one kernel or a few
- allocations: operations of torch that only allocate memory
- functions: autograd functions in Python

On a CPU, RWKV-5 to 7 do not use the GPU's kernels of the time-mix, nor dropout inside the token
shift; tests/wkv/wkv7/test_cuda_time_mix.py and tests/kernels/test_cuda_*.py count those.
"""

import argparse
import collections
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv.adapters import lora
from rwkv.kernels.head_loss import head_loss
from rwkv.models import RWKV
from rwkv.models.version import named

sys.path.append(str(Path(__file__).parents[2] / "tests" / "wkv"))
from launches import ALLOCATIONS, NO_KERNEL

FEW, MANY = 4, 12  # layers
TOKENS, WIDTH, VOCAB = 32, 64, 64


class Row(NamedTuple):
    name: str
    version: str
    kind: str
    dropout: float = 0.0
    grad_cp: bool = False


ROWS = (
    Row("RWKV-4 LoRA", "4", "lora", 0.01),
    Row("RWKV-4 LoRA, no dropout", "4", "lora"),
    Row("RWKV-4 LoRA, --grad_cp 1", "4", "lora", 0.01, grad_cp=True),
    Row("RWKV-4 full", "4", "full"),
    Row("RWKV-7 LoRA", "7", "lora", 0.01),
    Row("RWKV-7 full", "7", "full"),
)


class Count(TorchDispatchMode):
    """Counts operations by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function).split(".")[1]
        if name not in NO_KERNEL:
            self.found["kernels"] += 1
            self.found["casts"] += name == "_to_copy" and result.dtype != args[0].dtype
            self.found["casts"] += name == "copy_" and args[0].dtype != args[1].dtype
        self.found["allocations"] += name in ALLOCATIONS
        return result


def functions(loss: torch.Tensor) -> int:
    """Autograd functions in Python that the graph of a loss has."""
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
    return sum(isinstance(node, torch.autograd.function.BackwardCFunction) for node in seen)


def make_step(row: Row, layers: int) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]:
    """The forward and the backward pass of a step."""
    torch.manual_seed(0)
    model = RWKV(named(row.version).Sizes(n_layer=layers, n_embd=WIDTH, vocab_size=VOCAB), row.grad_cp)
    model.initialise(1e-4, frozen=row.kind == "lora")
    if row.kind == "lora":
        lora.inject(model, ["att"], 8, 32, row.dropout)
        lora.mark_trainable(model, ["att", "ln", "time"])
        lora.store_frozen(model, torch.bfloat16)
    ids = torch.randint(VOCAB, (1, TOKENS + 1))

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden, _ = model.hidden(ids[:, :-1])
            return head_loss(hidden, model.head.weight, ids[:, 1:])

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return forward, backward


def measure(row: Row, layers: int, rounds: int) -> collections.Counter[str]:
    """What a step does, and microseconds."""
    forward, backward = make_step(row, layers)
    for _ in range(2):
        backward(forward())
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        backward(forward())
        best = min(best, time.process_time() - begin)
    with Count() as count:
        loss = forward()
        found = functions(loss)
        backward(loss)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        backward(forward())
    ours = sum(event.name.startswith("rwkv::") for event in profiled.events())
    return collections.Counter(count.found, us=round(1e6 * best), ours=ours, functions=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="steps, of which the fastest counts")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    c = parser.parse_args()
    torch.set_num_threads(1)
    heads = ("us", "kernels", "casts", "ours", "allocations", "functions")
    print(f"{'per block':28}" + "".join(f"{head:>13}" for head in heads))
    for row in ROWS:
        if c.only in row.name:
            few, many = (measure(row, layers, c.rounds) for layers in (FEW, MANY))
            each = ((many[head] - few[head]) / (MANY - FEW) for head in heads)
            print(f"{row.name:28}" + "".join(f"{number:13.1f}" for number in each), flush=True)
    print(f"torch {torch.__version__}")


if __name__ == "__main__":
    main()
