"""Memory of a training step on a CPU relative to the prediction of rwkv.memory.estimate, by part.

    python bench/memory.py [MODEL,METHOD,PRECISION,GRAD_CP,CTX_LEN,OPTIMIZER ...]

Example of a row: 1.5b,lora,bf16,1,1024,adam; of RWKV-6: 6:1.6b,lora,… or, with 12 layers and n_embd
768, 6:12x768,lora,… . METHOD is lora, full, state (state tuning), dpo (LoRA on one preference
pair), or for LoRA on a quantised base nf4, int8 or fp8 (modern stack).
After an optimizer `-released` is --release_grads 1, and `-copies` --bf16_copies 1. The default is
ROWS; its largest row needs 17 GB. Each row runs in its own process: three steps with random weights
and tokens. A cell shows the prediction in GB and the measurement in percent of it:
- weights, gradients, optimizer: bytes of the tensors
- saved activations and the peak of each phase: torch's profiler, in the last step
- resident: peak of the process in the second step, less its size before the model was created
"""

import json
import re
import subprocess
import sys
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from rwkv import compat
from rwkv.adapters import lora, state
from rwkv.config import DPOConfig, TrainConfig
from rwkv.kernels import bf16_copy, quant
from rwkv.kernels.linear import Matrix
from rwkv.memory import estimate, machine
from rwkv.memory.parts import matrices
from rwkv.memory.plan import Plan
from rwkv.models import RWKV
from rwkv.models.version import named, published
from rwkv.train.loop import optimizer
from rwkv.train.objectives.dpo import DPO
from rwkv.train.runtime import cpu

ROWS = (
    "0.1b,lora,fp32,0,1024,adam", "0.1b,lora,bf16,0,1024,adam", "0.1b,lora,bf16,1,1024,adam",
    "0.1b,nf4,fp32,1,1024,adam", "0.1b,nf4,bf16,0,1024,adam", "0.1b,int8,fp32,1,1024,adam", "0.4b,nf4,bf16,1,1024,adam",
    *(["0.1b,fp8,bf16,1,1024,adam", "0.4b,fp8,bf16,1,1024,adam"] if compat.float8() else []),
    "0.1b,full,fp32,0,512,adam", "0.1b,full,bf16,0,1024,adam", "0.1b,full,bf16,1,1024,adafactor",
    "0.1b,full,bf16,0,1024,adam-copies", "0.4b,full,bf16,1,512,adam-copies",
    "0.4b,lora,fp32,0,512,adam", "0.4b,lora,bf16,0,1024,adam", "0.4b,lora,bf16,1,1024,adam",
    "0.4b,full,bf16,0,512,adam", "0.4b,full,bf16,1,1024,adam", "0.4b,full,bf16,1,1024,adafactor",
    "0.1b,dpo,fp32,0,256,adam", "0.4b,dpo,bf16,1,512,adam",
    "0.1b,full,bf16,1,512,muon", "0.4b,full,bf16,1,1024,adamw8bit", "0.4b,full,bf16,1,1024,adamw8bit-released",
    "1.5b,lora,bf16,0,512,adam", "1.5b,lora,bf16,1,512,adam", "1.5b,lora,bf16,1,1024,adam", "1.5b,full,bf16,1,512,adafactor",
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TENSORS, PHASES = ("weights", "gradients", "optimizer", "saved"), ("forward", "backward", "optimizer")


def plan_of(row: str) -> Plan:
    model, method, precision, grad_cp, ctx_len, last = row.split(",")
    kind, *options = last.split("-")
    number, _, name = model.rpartition(":")
    version = named(number)
    by_size = re.fullmatch(r"(\d+)x(\d+)", name)
    sizes = version.Sizes(int(by_size[1]), int(by_size[2])) if by_size else published(name, version)
    adapter = {"parts": (state.PART,), "r": 1} if method == "state" else {}
    return Plan(
        replace(sizes, time_state=True) if method == "state" else sizes,
        method != "full",
        **adapter,
        base=method if method in quant.KINDS else "auto",
        sequences=2 if method == "dpo" else 1,
        precision=precision,
        grad_cp=grad_cp == "1",
        ctx_len=int(ctx_len),
        optimizer=kind,
        release_grads="released" in options,
        bf16_copies="copies" in options,
        gpu=False,
        process=compat.process_bytes(),
    )


def bytes_of(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if torch.is_tensor(x))


class Step:
    """A training step like rwkv.train's, on random weights."""

    def __init__(self, p: Plan):
        self.precision = p.precision
        self.model = model = RWKV(p.sizes, p.grad_cp, device="meta")
        # one at a time, directly in its final dtype, as in checkpoint.load_model, where matrices to
        # quantise are in a mapped file: their memory would leave holes in the heap
        largest = max(shape.numel() for shape in matrices(p.sizes).values()) if p.quantised else 0
        mapped = torch.empty(largest, dtype=DTYPES[p.precision])
        for name, parameter in list(model.named_parameters()):
            narrow = (p.lora or p.optimizer == "adamw8bit") and lora.is_matrix(name, parameter.shape)
            dtype = DTYPES[p.precision] if narrow else torch.float32
            quantised = p.quantised and lora.is_quantisable(name, parameter.shape)
            shape = parameter.shape
            value = mapped[: shape.numel()].view(shape) if quantised else torch.empty(shape, dtype=dtype)
            value.normal_(0, shape[-1] ** -0.5)
            if quantised:
                model.get_submodule(name.removesuffix(".weight")).set_quantised(quant.KINDS[p.quantised](value))
            else:
                model.set_parameter(name, value)
        if p.lora:
            lora.inject(model, p.parts, p.r, 2 * p.r, 0.01)
            lora.mark_trainable(model, p.parts)
            lora.store_frozen(model, DTYPES["bf16" if p.frozen == 2 else "fp32"])
        if p.bf16_copies:
            for layer in model.modules():
                if isinstance(layer, Matrix):
                    layer.keep_bf16_copy()
        switched = {"release_grads": int(p.release_grads), "bf16_copies": int(p.bf16_copies)}
        flags = TrainConfig(optimizer=p.optimizer, precision=p.precision, lr_init=1e-5, **switched)
        self.optimizer = optimizer.make(model, flags)
        self.ids = torch.randint(p.sizes.vocab_size, (p.micro_bsz * p.sequences, p.ctx_len + 1))
        self.pairs = p.sequences == 2

    def __call__(self, watched=lambda name, work: work()) -> int:
        """Run one step, each phase through `watched`. Returns the bytes of the gradients."""
        loss = []

        def forward() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                loss.append(self._of_pairs() if self.pairs else self._of_text())

        watched("forward", forward)
        watched("backward", lambda: loss.pop().backward())
        gradients = bytes_of(x.grad for x in self.model.parameters())
        watched("optimizer", self.optimizer.step)
        self.optimizer.zero_grad(set_to_none=True)
        return gradients

    def _of_text(self) -> torch.Tensor:
        return self.model.head(self.model.hidden(self.ids[:, :-1])[0], self.ids[:, 1:])

    def _of_pairs(self) -> torch.Tensor:
        x, y = (ids.reshape(-1, 2, ids.shape[1]) for ids in (self.ids[:, :-1], self.ids[:, 1:]))
        batch = [x, y, torch.ones_like(y, dtype=torch.bool), torch.zeros(len(x), 2)]
        return DPO(DPOConfig()).loss(self.model, lambda x, _: self.model.hidden(x)[0], batch, False).mean


def measure(p: Plan) -> dict:
    """Bytes of each part and phase of a step."""
    cpu.prepare()
    resting, step = machine.rss(), Step(p)
    packed = sum(matrix.nbytes for matrix in quant.quantised_in(step.model))
    weights = [*step.model.parameters(), *map(bf16_copy.memory, step.model.parameters())]
    found = {"weights": packed + bytes_of(weights), "gradients": step()}
    found["optimizer"] = bytes_of(x for state in step.optimizer.state.values() for x in state.values())
    machine.rss_peak(restart=True)
    step()
    found["resident"] = machine.rss_peak() - resting
    now = begin = found["weights"] + found["optimizer"] + bytes_of([step.ids])
    phases = {}

    def traced(name: str, work) -> None:
        nonlocal now
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        top = now
        for event in sorted(
            events, key=lambda event: event.start_ns() if hasattr(event, "start_ns") else event.start_us()
        ):
            now += event.nbytes()
            top = max(top, now)
        phases[name] = top
        if name == "forward":
            found["saved"] = now - begin

    step(traced)
    return found | {"phases": phases}


def main(rows: list[str]) -> None:
    heads = ["weights", "gradients", "optimizer", "saved", *(f"peak {name}" for name in PHASES), "peak", "resident"]
    print(f"{'':34}" + "".join(f"{head:>17}" for head in heads))
    for row in rows:
        done = subprocess.run([sys.executable, __file__, "--worker", row], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{row:34}  exited with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        found, p = json.loads(done.stdout.splitlines()[-1]), plan_of(row)
        estimated = estimate.estimate(p)
        first, last = estimated.phase_parts["forward"], estimated.phase_parts["optimizer"]
        predicted = [first["weights"], last["gradients"], first["optimizer"], first["activations"] + first["gradients"]]
        predicted += [estimated.tensors[name] for name in PHASES]
        measured = [found[name] for name in TENSORS] + [found["phases"][name] for name in PHASES]
        predicted += [max(estimated.tensors.values()), estimated.total - p.process + estimate.LOADED]
        measured += [max(found["phases"].values()), found["resident"]]
        print(
            f"{row:34}"
            + "".join(f"{x / 1e9:10.3f} {y / max(1, x):5.0%} " for x, y in zip(predicted, measured, strict=True)),
            flush=True,
        )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(measure(plan_of(sys.argv[2]))))
    else:
        main(sys.argv[1:] or [*ROWS])
