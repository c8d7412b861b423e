"""Files in a run's folder: which ones this program wrote, and how far an earlier run got."""

import contextlib
import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv import adapter_files, checkpoint
from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.train import data_source
from rwkv.train.callbacks import best as bests
from rwkv.train.callbacks import dashboards, reference
from rwkv.train.callbacks.page.document import GENERATOR
from rwkv.train.loop import schedule
from rwkv.train.resume import run_manifest, state_files
from rwkv.train.run import NEW_BASE

_FILES = ("run.json", "metrics.jsonl", "train_log.txt", "loss.png", "samples.jsonl", "report.html", reference.NAME)
_CHECKPOINT = re.compile(r"rwkv-(\d+|final|best|base)\.pth")
_CORRUPT = re.compile(r"metrics\.jsonl\.corrupt(\.\d+)?")


@dataclass(frozen=True)
class Saved:
    """A checkpoint in the folder.

    Attributes:
        number: N of rwkv-N.pth; -1 for rwkv-final.pth.
        manifest: empty if this program did not write it.
    """

    path: Path
    number: int
    manifest: dict[str, Any]

    @property
    def is_own(self) -> bool:
        """Whether this program wrote it."""
        return bool(self.manifest)


def checkpoints(folder: Path) -> list[Saved]:
    """All rwkv-N.pth, sorted by number; rwkv-final.pth comes first. (rwkv-best.pth and
    rwkv-base.pth are not included: a run does not continue from them.)
    """
    found = []
    for path in _glob(folder):
        if (match := _CHECKPOINT.fullmatch(path.name)) and match[1] not in ("base", "best"):
            found.append(Saved(path, -1 if match[1] == "final" else int(match[1]), _manifest(path)))
    return sorted(found, key=lambda saved: saved.number)


def run_files(folder: Path) -> list[Path]:
    """Training states and files with the names of a run's files, whoever wrote them."""
    named = [
        path for path in _glob(folder) if path.name in _FILES or _CHECKPOINT.fullmatch(path.name.removesuffix(".json"))
    ]
    return [*named, *state_files.states(folder)]


def own_files(folder: Path) -> list[Path]:
    """Files that this program wrote for the run in this folder; all others may be upstream's
    or the user's.
    """
    by_name = {path.name: path for path in _glob(folder)}
    found = [by_name[run_manifest.NAME]] if run_manifest.NAME in by_name else []
    if found or _has_steps(by_name.get("metrics.jsonl")):
        found += [
            by_name[name]
            for name in by_name
            if name in ("metrics.jsonl", "loss.png", "samples.jsonl", reference.NAME) or _CORRUPT.fullmatch(name)
        ]
        found += dashboards.files(folder)
    if "report.html" in by_name and GENERATOR in _beginning(by_name["report.html"]):
        found.append(by_name["report.html"])
    if "train_log.txt" in by_name and "'allow_changes':" in "".join(
        _beginning(by_name["train_log.txt"]).splitlines()[1:2]
    ):
        found.append(by_name["train_log.txt"])  # has a flag that upstream lacks
    for name, path in by_name.items():
        if _CHECKPOINT.fullmatch(name.removesuffix(".json")) and _manifest(path.with_name(name.removesuffix(".json"))):
            found.append(path)
    for prefix in data_source.copies(folder):
        found += data_source.files_of(prefix)
    return found + state_files.leftovers(folder)


def names(folder: Path, paths: Iterable[Path]) -> str:
    """Format paths relative to the folder, for messages."""
    return ", ".join(sorted(str(path.relative_to(folder)) for path in paths)) or "nothing"


def check_paths(folder: Path) -> None:
    """Raise UserError if there is a folder where the run writes a file, or a file where it needs a
    folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file, but --proj_dir must be a folder; choose another name")
    if state_files.folder_of(folder).exists() and not state_files.folder_of(folder).is_dir():
        raise UserError(
            f"{state_files.folder_of(folder)}: must be a folder, because training states are saved in it; move this file away"
        )
    for path in _glob(folder):
        if path.is_dir() and (path.name in _FILES or _CHECKPOINT.fullmatch(path.name.removesuffix(".json"))):
            raise UserError(
                f"{path}: a folder, but the run writes a file of this name; move it away, or choose another --proj_dir"
            )


def check_overwrites(c: TrainConfig) -> None:
    """Raise UserError if a new run would overwrite a checkpoint or picture that this program did
    not write.
    """
    base, own = c.folder / NEW_BASE, own_files(c.folder)
    for picture in (c.folder / "loss.png", c.folder / "report.html"):
        if not picture.exists() or picture in own:
            continue
        raise _foreign(picture)
    if c.adapter and not c.load_model and base.exists() and not _manifest(base):
        raise UserError(
            f"{base}: this run would overwrite it with a new base, but it was not written by this program; pass it as --load_model to"
            " train on it, move it away, or choose another --proj_dir"
        )
    if c.keep_best and (best := c.folder / bests.NAME).exists() and not _manifest(best):
        raise _foreign(best, "--keep_best true")
    for saved in checkpoints(c.folder):
        if saved.is_own:
            continue
        final = saved.number < 0
        ends = schedule.first_step(c) + schedule.total_steps(c)
        last = -(-ends // schedule.steps_per_epoch(c)) - 1
        due = c.epoch_begin <= saved.number <= last and (
            (saved.number - c.epoch_begin) % c.epoch_save == 0 or saved.number == last
        )
        if final or due:
            raise _foreign(saved.path)


def _foreign(path: Path, what: str = "this run") -> UserError:
    return UserError(
        f"{path}: {what} would overwrite it, but it was not written by this program; move it away, or choose another --proj_dir"
    )


def describe_loss_of_states(folder: Path, before: dict[str, Any]) -> str:
    """Describe what is left of the run with manifest `before` if its training states are lost.
    Empty if it never saved one.

    Args:
        before: the manifest of a run without a valid state.
    """
    c = run_manifest.flags_of(before)
    first = schedule.first_step(c)
    if corrupt := [path for path in state_files.leftovers(folder) if path.suffix != ".tmp"]:
        return f"only corrupt training states ({names(folder, corrupt)})"
    if later := [saved.path for saved in checkpoints(folder) if _step(saved, c) > first]:
        return f"checkpoints ({names(folder, later)}) but no training state"
    if before.get("state_saved"):
        return "a run whose training states were deleted"
    if (last := _last_step(folder / "metrics.jsonl")) > first + (c.save_every or 10):
        return f"metrics of {last:,} steps but no training state"
    return ""


def how_to_continue(c: TrainConfig) -> str:
    """Options for the user if a folder has no valid training state; ends with a full stop."""
    found = checkpoints(c.folder)
    options = []
    if found:
        newest = found[-1]
        path = shlex.quote(str(newest.path))
        kind = newest.manifest.get("kind", "adapter" if c.trains == "LoRA" else "state" if c.adapter else "")
        flag = {"adapter": "--lora_load", "state": "--state_load"}.get(kind)
        base = c.load_model or _base_of(newest)
        load = f"--load_model {shlex.quote(str(base))} {flag} {path}" if flag and base else f"--load_model {path}"
        if newest.number < 0:
            options.append(f"to continue from {newest.path.name} with a new optimizer: {load} and another --proj_dir")
        else:
            begin = newest.number + 1
            more = f" --epoch_count {begin + 1} (or more)" if c.epoch_count <= begin else ""
            options.append(
                f"to continue from {newest.path.name} with a new optimizer: {load} --epoch_begin {begin}{more}"
            )
    options.append(f"to start over at step 0: --overwrite, which deletes {names(c.folder, own_files(c.folder))}")
    options.append("or choose another --proj_dir")
    return "; ".join(options) + "."


def _base_of(saved: Saved) -> Path | None:
    """The base that an adapter's manifest names, relative to its folder; None if not found."""
    with contextlib.suppress(UserError):
        return adapter_files.find_base(saved.path)
    return None


def _glob(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.is_dir() else []


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint written by this program; else empty."""
    try:
        found = json.loads(checkpoint.manifest_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    stack = found.get("stack") if isinstance(found, dict) else None
    # rwkv-trainer is the project's old name
    return found if isinstance(stack, dict) and {"rwkv-training", "rwkv-trainer"} & stack.keys() else {}


def _step(saved: Saved, c: TrainConfig) -> int:
    """The step of a checkpoint, from its manifest or else its number."""
    step = saved.manifest.get("step")
    return step if isinstance(step, int) else (saved.number + 1) * schedule.steps_per_epoch(c)


def _has_steps(metrics: Path | None) -> bool:
    return metrics is not None and _steps(_beginning(metrics)) != []


def _last_step(metrics: Path) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    try:
        with open(metrics, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - (1 << 16)))
            found = _steps(file.read().decode("utf-8", errors="replace"))
    except OSError:
        return 0
    return found[-1] if found else 0


def _steps(text: str) -> list[int]:
    """The steps of all valid lines."""
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value["step"])
    return found


def _beginning(path: Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(1 << 14)
