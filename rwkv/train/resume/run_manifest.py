"""run.json, the manifest of a run: everything needed to reproduce it, and to check that a command
resumes it with the same settings.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from rwkv import compat
from rwkv.adapters import lora
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.data.binidx import Dataset, mask_path
from rwkv.errors import UserError
from rwkv.files import fingerprint, sha256, write_json
from rwkv.kernels import build
from rwkv.models import version
from rwkv.train.loop import schedule
from rwkv.train.run import Run
from rwkv.weights import peft_adapter

_ROOT = Path(__file__).parents[3]
_GIT = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
NAME = "run.json"

# flags that may change on resume: they do not affect the steps, or are compared in another form
_NOT_COMPARED = {
    *("proj_dir", "overwrite", "allow_changes", "random_seed"),
    *("load_model", "lora_load", "state_load", "data_file", "data_type", "val_file"),  # compared by content
    *("max_steps", "epoch_count", "my_exit", "epoch_save", "save_every", "val_every", "val_samples"),
    *("keep_best", "patience", "sample_every", "sample_ask", "wandb", "tensorboard", "on_nan"),
    # compared as the model's sizes
    *("version", "n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "pre_ffn", "head_size"),
    *("strategy", "ds_bucket_mb", "ds_config", "accelerator", "grad_cp", "bf16_copies", "cuda_graph", "precision"),
    "train_type",  # compared as what is trained
    # compared as samples per step and steps per epoch
    *("micro_bsz", "accumulate_grad_batches", "devices", "num_nodes", "epoch_steps", "auto"),
}


def describe(run: Run, source: dict[str, Any] | None) -> dict[str, Any]:
    """The manifest of a run, without its data (see `data_of`).

    Args:
        source: description of the file to be converted (rwkv.train.data_source.describe).
    """
    lock, kernel = _ROOT / "env/locks" / f"{compat.stack()}.txt", build.folder() / "manifest.json"
    c, adapter = run.flags, run.adapter.lora_load if run.adapter else ""
    return {
        "flags": dataclasses.asdict(c),
        "seed": c.random_seed,
        "git": _revision(),
        "stack": {"name": compat.stack(), "lock_sha256": sha256(lock) if lock.exists() else None, **_versions()},
        "kernel": {"source_sha256": build.manifest()["source_hash"], "manifest_sha256": sha256(kernel)}
        if kernel.exists()
        else None,
        "precision": c.precision,
        "version": version.version_of(run.sizes).NAME,
        "model": vars(run.sizes),
        "base": run.base,
        "adapter": {"path": adapter, "sha256": sha256(peft_adapter.file_of(Path(adapter)))} if adapter else None,
        "source": source,
    }


def data_of(data: Dataset) -> dict[str, Any]:
    """Size and hashes of a binidx, its index and its loss mask (if any)."""
    raw, mask = Path(f"{data.prefix}.bin"), mask_path(data.prefix)
    return {
        "prefix": str(data.prefix),
        "bytes": raw.stat().st_size,
        "sha256": fingerprint(raw),
        "index_sha256": fingerprint(f"{data.prefix}.idx"),
        "mask_sha256": fingerprint(mask) if mask.exists() else None,
    }


def data_files(data: dict[str, Any]) -> list[tuple[Path, str]]:
    """The files described by `data_of`, with their fingerprints."""
    prefix = data["prefix"]
    files = [(Path(f"{prefix}.bin"), data["sha256"]), (Path(f"{prefix}.idx"), data["index_sha256"])]
    return files + ([(mask_path(prefix), data["mask_sha256"])] if data["mask_sha256"] else [])


@functools.cache  # of the code that this process runs
def _revision() -> str | None:
    """The program's git commit, followed by + if there are uncommitted changes; None without
    git.
    """
    found = (
        [subprocess.run(["git", "-C", _ROOT, *words], capture_output=True, text=True, check=False) for words in _GIT]
        if shutil.which("git")
        else []
    )
    if not found or any(done.returncode for done in found):
        return None
    return found[0].stdout.strip() + ("+" if found[1].stdout else "")


@functools.cache
def _versions() -> dict[str, str]:
    packages = ("torch", "pytorch-lightning", "deepspeed", "numpy")
    found = {
        name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name.replace("-", "_"))
    }
    return {"python": platform.python_version(), **found}


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of the run in this folder; None if there is none.

    Raises:
        UserError: the file cannot be read, or is not the manifest of a run.
    """
    path = folder / NAME
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); choose another --proj_dir") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); choose another --proj_dir, or --overwrite to start over"
        ) from error
    if problem := _problem(run):
        raise UserError(
            f"{path}: not the manifest of a run ({problem}); choose another --proj_dir, or --overwrite to start over"
        )
    return run


def _problem(run: Any) -> str:
    """Why a manifest is invalid; empty if it is valid."""
    if not isinstance(run, dict):
        return f"it contains a {type(run).__name__}"
    for key, kind in {
        "flags": dict,
        "model": dict,
        "data": dict,
        "precision": str,
        "base": dict | None,
        "adapter": dict | None,
    }.items():
        if key not in run and key != "adapter":
            return f'"{key}" is missing'
        if not isinstance(run.get(key), kind):
            return f'"{key}" is of type {type(run[key]).__name__}'
    for key in ("sha256", "bytes"):
        if key not in run["data"]:
            return f'"data" has no "{key}"'
    fields = {field.name: field.default for field in dataclasses.fields(LoRAConfig)}
    for key in ("epoch_begin", "epoch_count", "random_seed", "epoch_steps", "micro_bsz", "ctx_len"):
        if key not in run["flags"]:
            return f'"flags" has no "{key}"'
    for key, value in run["flags"].items():
        if key in fields and not isinstance(value, _kind_of(fields[key])):
            return f'"flags": "{key}" is {value!r:.40}'
    if not all(isinstance(entry, dict) and "changes" in entry for entry in _listed(run)):
        return '"changed" is not a list of changes'
    try:
        _compared(run)
    except (ArithmeticError, TypeError, ValueError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _kind_of(default: Any) -> Any:
    """The type of a flag's value, from its default; numbers may be int or float."""
    return int | float if isinstance(default, int | float) and not isinstance(default, bool) else type(default)


def _listed(run: dict[str, Any]) -> list[Any]:
    found = run.get("changed", [])
    return found if isinstance(found, list) else [None]


def write(folder: Path, run: dict[str, Any]) -> None:
    """Write run.json atomically."""
    write_json(folder / NAME, run)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences between two manifests that would change the training steps, one line each."""
    old, new = _compared(before), _compared(now)
    if "--lora_parts" in old and "--lora_parts" in new:
        parts = version.VERSIONS[now["version"]].PARTS
        if len({tuple(parts.normal(lora.parts_in(run["--lora_parts"]))) for run in (old, new)}) == 1:
            old.pop("--lora_parts")  # the same parts, possibly written in another way
    defaults = {f"--{field.name}": field.default for field in dataclasses.fields(LoRAConfig)}
    defaults["--optimizer"] = "adam"  # which auto was
    for key in sorted((new.keys() - old.keys()) & defaults.keys()):  # flags that the program did not have yet
        if key[2:] not in before["flags"]:
            old[key] = defaults[key]
    found = [f"{key}: {_short(old[key])} → {_short(new[key])}" for key in old if key in new and old[key] != new[key]]
    sources = [run["source"] for run in (before, now) if run.get("source")]
    if len(sources) == 2 and sources[0]["sha256"] != sources[1]["sha256"]:
        found.insert(0, "data file: " + " → ".join(f"{one['path']} (SHA-256 {one['sha256'][:16]}…)" for one in sources))
    return found


def _short(value: Any) -> str:
    return "none" if value is None else str(value)


def flags_of(run: dict[str, Any]) -> TrainConfig:
    """The training flags of a run."""
    flags = run["flags"]
    return TrainConfig(
        **{field.name: flags[field.name] for field in dataclasses.fields(TrainConfig) if field.name in flags}
    )


def _compared(run: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that determine its steps."""
    flags, c = run["flags"], flags_of(run)
    lora, validation = bool(flags.get("lora")), run.get("validation")
    kept = {
        f"--{key}": value
        for key, value in flags.items()
        if key not in _NOT_COMPARED and (lora or not key.startswith("lora"))
    }
    found = {
        "trained": "an adapter"
        if lora
        else "an initial state"
        if flags.get("train_type") == "state"
        else "all weights",
        # without options that are off, which earlier versions of this program lack
        "model": {key: value for key, value in run["model"].items() if value is not False},
        **kept,
        "--random_seed": flags["random_seed"],
        "samples in a step": schedule.samples_per_step(c),
        "steps in an epoch": schedule.steps_per_epoch(c),
        "--precision": run["precision"],
        "base model (SHA-256)": (run["base"] or {}).get("sha256"),
        # a validation set may be added or removed; with another one, losses would not be comparable
        **({"validation set (SHA-256, bytes)": (validation["sha256"], validation["bytes"])} if validation else {}),
    }
    if validation and "index_sha256" in validation:
        found["validation documents, in the index (SHA-256)"] = validation["index_sha256"]
        found["validation loss mask (SHA-256)"] = validation["mask_sha256"]
    if "adapter" in run:
        found[f"--{'lora' if lora else 'state'}_load (SHA-256)"] = (run["adapter"] or {}).get("sha256")
    if source := run.get("source"):
        found["data file is read as"] = source["read_as"]
        found[f"data file {source['path']}"] = (
            "missing; the copy that was converted from it is used" if source.get("missing") else "present"
        )
    data = run.get("data", {})
    if data.get("sha256"):  # older manifests lack it for data above 4 GiB
        found["data (SHA-256, bytes)"] = (data["sha256"], data["bytes"])
    if "index_sha256" in data:
        found["documents, in the index (SHA-256)"] = data["index_sha256"]
        found["loss mask (SHA-256)"] = data["mask_sha256"]
    return found
