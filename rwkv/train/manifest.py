"""What a run was made from, in run.json: with it a run is repeated, and a run that goes on is held against what it was."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rwkv.config import TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.errors import UserError
from rwkv.files import sha256, write_json
from rwkv.model import Sizes
from rwkv.train import schedule

NAME = "run.json"
_HASH_LIMIT = 4 << 30  # bytes of a dataset that are still hashed: some seconds

# Flags that leave every step as it is: where a run ends, where files lie, how it is watched, what machine does it.
_FREE = {
    *("proj_dir", "overwrite", "allow_changes", "random_seed", "load_model", "lora_load", "data_file"),  # the last three by their content
    *("max_steps", "epoch_count", "epoch_save", "save_every", "val_every", "val_samples", "wandb"),
    *("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "pre_ffn"),  # these by the model's sizes
    *("strategy", "accelerator", "grad_cp", "precision"),
    *("micro_bsz", "accumulate_grad_batches", "devices", "num_nodes", "epoch_steps"),  # these by what they come to
}


def describe(c: TrainConfig, precision: str, sizes: Sizes, data: Dataset) -> dict[str, Any]:
    """The manifest of a run; `c` with the seed that is used."""
    raw = Path(f"{data.prefix}.bin")
    size = raw.stat().st_size
    return {
        "flags": dataclasses.asdict(c),
        "precision": precision,
        "model": vars(sizes),
        "data": {"prefix": str(data.prefix), "bytes": size, "sha256": sha256(raw) if size <= _HASH_LIMIT else None},
        "base": {"path": c.load_model, "sha256": sha256(c.load_model)} if c.load_model else None,
    }


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
    }
