"""Kill runs at random times, resume them, and compare with an uninterrupted run bit by bit.

    python bench/faults.py --kills 20 --seed 1

A LoRA run and a full-tuning run, both with dropout, accumulation and warm-up, are each killed
(SIGKILL) --kills times: while starting, between steps, inside steps, and while saving. Exits with
status 1 if a loss, learning rate or weight differs.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from rwkv import checkpoint
from rwkv.data.binidx_writer import writer
from rwkv.models import RWKV
from rwkv.models.v4 import Sizes
from rwkv.train.resume import state_files

SCRIPTS = Path(__file__).parents[1] / "scripts"
MAX_STEPS = 25  # steps after resuming before the next kill, at most
FLAGS = {
    "ctx_len": 32,
    "micro_bsz": 2,
    "accumulate_grad_batches": 2,
    "warmup_steps": 20,
    "lr_init": 1e-3,
    "lr_final": 1e-4,
    "epoch_count": 1,
}
FLAGS |= {"random_seed": 1, "accelerator": "cpu", "save_every": 2}
KINDS = {"LoRA": ("lora.py", {"lora_dropout": 0.1}), "full tuning": ("finetune.py", {"dropout": 0.1})}


def main() -> int:
    """Kill, resume and compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills per kind of run")
    parser.add_argument("--seed", type=int, default=1, help="random seed of the kill times")
    parser.add_argument("--kind", choices=KINDS, help="run this kind only")
    arguments = parser.parse_args()
    rng, equal = random.Random(arguments.seed), True
    steps = 50 * (arguments.kills + 1)  # more than can be completed between kills
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = make_inputs(folder)
        for kind in [arguments.kind] if arguments.kind else KINDS:
            script, flags = KINDS[kind]
            all_flags = FLAGS | flags | inputs | {"epoch_steps": 2 * steps}
            argv = [
                sys.executable,
                str(SCRIPTS / script),
                *(str(word) for key, value in all_flags.items() for word in (f"--{key}", value)),
            ]
            uninterrupted, killed = folder / f"{script}-uninterrupted", folder / f"{script}-killed"
            subprocess.run([*argv, "--proj_dir", uninterrupted], capture_output=True, check=True)
            kills = [kill([*argv, "--proj_dir", str(killed)], killed, rng) for _ in range(arguments.kills)]
            subprocess.run([*argv, "--proj_dir", killed], capture_output=True, check=True)
            different = differences(killed, uninterrupted)
            equal = equal and not different
            print(
                f"{kind}: {len(kills)} kills at steps {', '.join(map(str, kills))}; {steps} steps,",
                different or "all equal",
                flush=True,
            )
    return 0 if equal else 1


def make_inputs(folder: Path) -> dict[str, str]:
    """A small base model and data."""
    torch.manual_seed(0)
    model = RWKV(Sizes(2, 32, 256, 32, 128))
    model.initialise(emb_scale=1e-2)
    checkpoint.save_model(folder / "base.pth", model, {})
    with writer(folder / "data") as out:
        out.add(torch.randint(256, (20000,)).tolist())
    return {"load_model": str(folder / "base.pth"), "data_file": str(folder / "data")}


def kill(argv: list[str], folder: Path, rng: random.Random) -> int:
    """Start or resume the run, kill it after a few random steps; returns the last logged step."""
    saved = state_files.states(folder)
    goal = (int(saved[0].stem.removeprefix("step-")) if saved else 0) + rng.randint(0, MAX_STEPS)
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 5))  # while it starts
    else:
        while len(losses(folder)) < goal:
            if process.poll() is not None:
                raise SystemExit(f"a run exited by itself: {process.stderr.read().decode()}")
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
    process.kill()
    process.communicate()
    return len(losses(folder))


def losses(folder: Path) -> list[str]:
    """Step, loss and learning rate of every complete line of metrics.jsonl."""
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [f"{line['step']} {line['loss']!r} {line['lr']!r}" for line in found]


def differences(killed: Path, uninterrupted: Path) -> str:
    """The differences between two finished runs; empty if there are none."""
    ours, theirs = losses(killed), losses(uninterrupted)
    if ours != theirs:
        return f"{sum(a != b for a, b in zip(ours, theirs, strict=False))} of {len(theirs)} lines differ; there are {len(ours)}"
    ours, theirs = (checkpoint.read_tensors(folder / "rwkv-0.pth") for folder in (killed, uninterrupted))
    return ", ".join(name for name in theirs if not torch.equal(ours[name], theirs[name]))


if __name__ == "__main__":
    sys.exit(main())
