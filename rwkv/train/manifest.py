"""What a run was made from, in run.json: with it a run is repeated, and a run that goes on is held against what it was."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.errors import UserError
from rwkv.files import sha256, write_json
from rwkv.model import Sizes
from rwkv.train import schedule
from rwkv.wkv import build

_ROOT = Path(__file__).parents[2]
_GIT = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
NAME = "run.json"
_HASH_LIMIT = 4 << 30  # bytes of a dataset that are still hashed: some seconds

# Flags that leave every step as it is: where a run ends, where files lie, how it is watched, what machine does it.
_FREE = {
    *(
        "proj_dir",
        "overwrite",
        "allow_changes",
        "random_seed",
        "load_model",
        "lora_load",
        "data_file",
        "val_file",
    ),  # the last four by their content
    *("max_steps", "epoch_count", "my_exit", "epoch_save", "save_every", "val_every", "val_samples", "wandb", "tensorboard", "on_nan"),
    *("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "pre_ffn"),  # these by the model's sizes
    *("strategy", "ds_bucket_mb", "ds_config", "accelerator", "grad_cp", "precision"),
    *("micro_bsz", "accumulate_grad_batches", "devices", "num_nodes", "epoch_steps", "auto"),  # these by what they come to
}


def describe(c: TrainConfig, precision: str, sizes: Sizes, data: Dataset, validation: Dataset | None = None) -> dict[str, Any]:
    """The manifest of a run; `c` with the seed that is used."""
    lock, kernel = _ROOT / "docker/locks" / f"{compat.stack()}.txt", build.folder() / "manifest.json"
    return {
        "flags": dataclasses.asdict(c),
        "seed": c.random_seed,
        "git": _revision(),
        "stack": {"name": compat.stack(), "lock_sha256": sha256(lock) if lock.exists() else None, **_versions()},
        "kernel": {"source_sha256": build.manifest()["source_hash"], "manifest_sha256": sha256(kernel)} if kernel.exists() else None,
        "precision": precision,
        "model": vars(sizes),
        "data": _content(data),
        "validation": _content(validation) if validation else None,
        "base": {"path": c.load_model, "sha256": sha256(c.load_model)} if c.load_model else None,
    }


def _content(data: Dataset) -> dict[str, Any]:
    raw = Path(f"{data.prefix}.bin")
    size = raw.stat().st_size
    return {"prefix": str(data.prefix), "bytes": size, "sha256": sha256(raw) if size <= _HASH_LIMIT else None}


def _revision() -> str | None:
    """The commit of this program, with + if files differ from it; None where there is no git."""
    found = (
        [subprocess.run(["git", "-C", _ROOT, *words], capture_output=True, text=True, check=False) for words in _GIT]
        if shutil.which("git")
        else []
    )
    if not found or any(done.returncode for done in found):
        return None
    return found[0].stdout.strip() + ("+" if found[1].stdout else "")


def _versions() -> dict[str, str]:
    packages = ("torch", "pytorch-lightning", "deepspeed", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name.replace("-", "_"))}
    return {"python": platform.python_version(), **found}


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of the run in this folder; None if there is none."""
    try:
        return json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{folder / NAME}: not valid JSON ({error}); give another --proj_dir, or --overwrite to start over") from error


def write(folder: Path, run: dict[str, Any]) -> None:
    """Write run.json, whole or not at all."""
    write_json(folder / NAME, run)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What would make the steps to come others than those of the run before, a line each."""
    old, new = _essence(before), _essence(now)
    return [f"{key}: {old[key]} → {new[key]}" for key in old if key in new and old[key] != new[key]]


def flags_of(run: dict[str, Any]) -> TrainConfig:
    """The training flags of a run."""
    flags = run["flags"]
    return TrainConfig(**{field.name: flags[field.name] for field in dataclasses.fields(TrainConfig) if field.name in flags})


def _essence(run: dict[str, Any]) -> dict[str, Any]:
    flags, c = run["flags"], flags_of(run)
    lora = bool(flags.get("lora"))
    kept = {f"--{key}": value for key, value in flags.items() if key not in _FREE and (lora or not key.startswith("lora"))}
    return {
        "trained": "an adapter" if lora else "all weights",
        "model": run["model"],
        **kept,
        "--random_seed": flags["random_seed"],
        "samples in a step": schedule.samples_per_step(c),
        "steps in an epoch": schedule.steps_per_epoch(c),
        "--precision": run["precision"],
        "data (SHA-256, bytes)": (run["data"]["sha256"], run["data"]["bytes"]),
        "base model (SHA-256)": (run["base"] or {}).get("sha256"),
        # A validation set changes no step: it may be added to a run, or left out; another one would make its losses incomparable.
        **({"validation set (SHA-256, bytes)": (found["sha256"], found["bytes"])} if (found := run.get("validation")) else {}),
    }
