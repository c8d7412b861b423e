"""Whether a run goes on in its folder, starts over, or must not start there; and from which state."""

import contextlib
import re
from pathlib import Path
from typing import Any

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.files import exclusive
from rwkv.train import dashboards, manifest, schedule, store
from rwkv.train.lightning import rank_zero_only
from rwkv.train.start import NEW_BASE
from rwkv.train.state import State
from rwkv.train.words import say

_RUN_FILES = re.compile(r"run\.json|metrics\.jsonl|train_log\.txt|loss\.png|rwkv-(\d+|final|base)\.pth(\.json)?")


def owned(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The lock on a run's folder, held by rank 0 for as long as the block runs. Raises UserError if another process holds it."""
    if rank_zero_only.rank > 0:
        return contextlib.nullcontext()
    return exclusive(folder / ".lock", folder, "choose another --proj_dir")


def earlier(c: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """The manifest of the run that this one goes on with; None for a new run, and on all ranks but the first.

    A run with epoch_begin goes on from weights alone, unless it is the run in the folder.

    Raises:
        UserError: the folder holds a run that cannot be gone on with.
    """
    if rank_zero_only.rank > 0 or c.overwrite:
        return None
    before = manifest.read(folder)
    if before and before["flags"]["epoch_begin"] == c.epoch_begin:
        return before
    old = _files(folder)
    if old and not c.epoch_begin:
        raise UserError(
            f"{folder} holds a run already ({old[0].name}, …), and nothing to go on from but weights; give another --proj_dir, or --overwrite"
            " to start over"
        )
    return None


def kept_base(c: TrainConfig, folder: Path, before: dict[str, Any] | None) -> Path | None:
    """The new base of a LoRA run that an earlier start of it wrote; None for a new run, or one that has a load_model.

    Raises:
        UserError: it is gone, and the run has trained on it.
    """
    path = folder / NEW_BASE
    if c.load_model or c.overwrite or not getattr(c, "lora", False):
        return None
    if rank_zero_only.rank > 0:  # it does not know whether the run is a new one, and gets rank 0's weights in any case
        return path if path.is_file() else None
    if not before or not store.states(folder):  # nothing has been trained on it
        return None
    if not path.is_file():
        raise UserError(f"{path}: missing; the adapter of this run is trained on it. Put it back, or give --overwrite to start over")
    return path


def outdated(c: TrainConfig, folder: Path, before: dict[str, Any] | None) -> list[Path]:
    """Files of an earlier run that this one gives up: to be deleted once nothing can be refused any more."""
    if rank_zero_only.rank > 0 or before:
        return []
    old = _files(folder) if c.overwrite else []
    inputs = {Path(path).resolve() for path in (c.load_model, getattr(c, "lora_load", "")) if path}
    if used := [path for path in old if path.resolve() in inputs]:
        raise UserError(f"--overwrite would delete {used[0]}, which this run starts from; give another --proj_dir")
    return old + sorted(store.folder_of(folder).glob("step-*")) + (dashboards.files(folder) if c.overwrite else [])


def find(c: TrainConfig, folder: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> State | None:
    """The state to go on from; None for a new run, or one that was ended before its first state.

    Raises:
        UserError: flags or data would make it another run, and `allow_changes` is not given.
    """
    if not before:
        return None
    changed = manifest.changes(before, now)
    if changed and not c.allow_changes:
        raise UserError(
            f"{folder} holds a run with other flags or data. From then to now:\n  "
            + "\n  ".join(changed)
            + "\nGo on with what it had; or --allow_changes to go on with these, --overwrite to start over, another --proj_dir for another run"
        )
    state = store.newest(folder)
    if changed:
        now["changed"] = [*before.get("changed", []), {"after_step": state.step if state else 0, "changes": changed}]
    step = state.step if state else schedule.first_step(c)
    left = schedule.first_step(c) + schedule.total_steps(c) - step
    say(f"continuing from step {step:,}: {max(0, left):,} steps left" + "".join(f"\n  changed: {line}" for line in changed))
    if left > 0:
        _say_rates(manifest.flags_of(before), c, step)
    return state


def _say_rates(old: TrainConfig, new: TrainConfig, step: int) -> None:
    """What a new end of the run makes of the learning rate at the next step, if anything."""
    then, now = (schedule.learning_rate(x, step - schedule.first_step(new)) for x in (old, new))
    if old.epoch_count != new.epoch_count and then != now:
        falls = f" and then {'falls' if new.lr_final < new.lr_init else 'rises'} until epoch {new.epoch_count}"
        say(
            f"note: --epoch_count changed from {old.epoch_count} to {new.epoch_count}, so the learning rate jumps from {then:.3g} to {now:.3g} now{falls}."
            " For a constant rate use --lr_init = --lr_final"
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if _RUN_FILES.fullmatch(path.name))
