"""Train with every strategy and precision on one GPU, and compare the losses with a plain run.

    python bench/gpu/strategies.py [--json FILE] [--accelerator cpu]

NCCL with one process: what a strategy does to numbers, not how it scales. Each run is 8 steps of a
tiny model in its own process, through rwkv.train.fit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from rwkv import checkpoint
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.data.binidx_writer import writer
from rwkv.models import RWKV
from rwkv.models.version import named

PROCESSES = 6
MAX_SECONDS = 70  # of one run
CONFIGS = {"full": TrainConfig, "lora": LoRAConfig}
RUN = {
    "ctx_len": 256,
    "micro_bsz": 4,
    "epoch_count": 1,
    "epoch_steps": 8,
    "random_seed": 1,
    "lr_init": 1e-3,
    "lr_final": 1e-3,
    "grad_clip": 1.0,
}
ZERO = {
    f"stage {stage}": {"strategy": f"deepspeed_stage_{stage}"} for stage in ("1", "2", "3", "2_offload", "3_offload")
}
VALIDATED = {"val_split": 0.3, "val_every": 4}  # trains on other samples
# (method, precision, name, flags); "plain" comes first for each method and precision
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("full", "bf16", "plain", {}),
    ("full", "bf16", "ddp", {"strategy": "ddp"}),
    *(("full", "bf16", name, flags) for name, flags in ZERO.items()),
    ("lora", "bf16", "plain", {}),
    ("lora", "bf16", "stage 2", ZERO["stage 2"]),
    ("lora", "bf16", "stage 3", ZERO["stage 3"]),
    ("lora", "bf16", "stage 3, --grad_cp 1", ZERO["stage 3"] | {"grad_cp": 1}),
    ("full", "fp16", "plain", {}),
    ("full", "fp16", "stage 2", ZERO["stage 2"]),
    ("full", "tf32", "plain", {}),
    ("full", "bf16 validated", "plain", VALIDATED),
    ("full", "bf16 validated", "stage 3", ZERO["stage 3"] | VALIDATED),
]


def make_inputs(folder: Path) -> None:
    """Write a base model and data to `folder`."""
    torch.manual_seed(0)
    model = RWKV(named("4").Sizes(n_layer=4, n_embd=256, vocab_size=1000))
    model.initialise(1e-4)
    checkpoint.save_model(folder / "base.pth", model, {})
    with writer(folder / "data") as out:
        out.add(torch.randint(1000, (60000,)).tolist())


def run(folder: Path, method: str, precision: str, name: str, flags: dict[str, Any], accelerator: str) -> None:
    """Train, and print the metrics as JSON on the last line."""
    from rwkv.train.fit import fit

    run_folder = folder / f"{method} {precision} {name}".replace(" ", "_")
    paths = {"load_model": str(folder / "base.pth"), "data_file": str(folder / "data"), "proj_dir": str(run_folder)}
    fit(CONFIGS[method](**RUN, **paths, **flags, precision=precision.split()[0], accelerator=accelerator))
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    print(json.dumps(lines))


def start(folder: Path, number: int, accelerator: str) -> tuple[list[dict[str, Any]], str]:
    """Run a case in its own process. Returns its metrics, or none and the error."""
    command = [sys.executable, __file__, "--case", str(number), "--folder", str(folder), "--accelerator", accelerator]
    environment = {**os.environ, "MASTER_PORT": str(29600 + number)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=MAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [], f"not finished after {MAX_SECONDS} s"
    if done.returncode:
        return [], (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    return json.loads(done.stdout.splitlines()[-1]), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file, after each run")
    parser.add_argument("--accelerator", default="gpu", help="cpu: to test this program")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    c = parser.parse_args()
    if c.case is not None:
        return run(c.folder, *CASES[c.case], c.accelerator)
    results, plain = [], {}

    def write() -> None:
        if c.json:
            c.json.write_text(json.dumps(results))

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(PROCESSES) as pool:
        make_inputs(Path(folder))
        cases = range(len(CASES))
        found = pool.map(lambda number: start(Path(folder), number, c.accelerator), cases)
        for (method, precision, name, _), (lines, error) in zip(CASES, found, strict=True):
            title = f"{method} {precision}, {name}"
            if error:
                results.append({"name": title, "error": error})
                print(f"{title:34} {error}", flush=True)
                write()
                continue
            losses = [line["loss"] for line in lines]
            base = plain.setdefault((method, precision), losses)
            difference = max(abs(a / b - 1) for a, b in zip(losses, base, strict=True))
            last = lines[-1]
            results.append({"name": title, "difference": difference, "first": losses[0], **last})
            print(
                f"{title:34} loss {losses[0]:.4f} to {losses[-1]:.4f}, difference from plain {difference:.1e};"
                f" norm {last.get('grad_norm')}; peak {last.get('gpu_peak_mib')} MiB, in use on the GPU {last.get('gpu_used_mib')} MiB",
                flush=True,
            )
            write()


if __name__ == "__main__":
    main()
