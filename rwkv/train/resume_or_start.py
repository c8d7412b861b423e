"""Whether a run continues in its folder, starts over, or must not start there; and from which state."""

import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.files import exclusive
from rwkv.train import data_source
from rwkv.train import folder as folders
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.resume import run_manifest, state_files
from rwkv.train.resume.run_state import State
from rwkv.train.runtime.lightning import rank_zero_only
from rwkv.train.setup import NEW_BASE

_SHAPING = (
    "trained:",
    "model:",
    "--lora_r:",
    "--lora_parts:",
    "--optimizer:",
)  # changes that tensors of a state depend on


def owned(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The lock on a run's folder, held by rank 0 for as long as the block runs. Raises UserError if another process holds it."""
    if rank_zero_only.rank > 0:
        return contextlib.nullcontext()
    return exclusive(folder / ".lock", folder, "choose another --proj_dir")


def earlier(c: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """The manifest of the run that this one continues; None for a new run, and on all ranks but the first.

    A run with epoch_begin continues from weights alone, unless it is the run in the folder.

    Raises:
        UserError: the folder contains a run that cannot be continued.
    """
    if rank_zero_only.rank > 0:
        return None
    folders.check_places(folder)
    before = None if c.overwrite else run_manifest.read(folder)
    if before and before["flags"]["epoch_begin"] == c.epoch_begin:
        return before
    if not c.overwrite and not c.epoch_begin and (old := folders.run_files(folder)):
        raise UserError(
            f"{folder} contains files of an earlier run ({folders.names(folder, old)}) but no {run_manifest.NAME}, so the run cannot be resumed."
            f" Choose one: {folders.how_to_continue(c, folder)}"
        )
    folders.check_kept(c, folder)
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
    if not before or not state_files.states(folder):  # nothing has been trained on it
        return None
    if not path.is_file():
        raise UserError(
            f"{path}: missing; the adapter of this run is trained on it. Put it back, or give --overwrite to start over"
        )
    return path


def outdated(c: TrainConfig, folder: Path, before: dict[str, Any] | None) -> list[Path]:
    """Files of an earlier run that this one gives up: to be deleted once nothing can be refused any more."""
    if rank_zero_only.rank > 0 or before:
        return []
    old = folders.written(folder) if c.overwrite else state_files.leftovers(folder)
    inputs = {Path(path).resolve() for path in (c.load_model, getattr(c, "lora_load", "")) if path}
    if used := [path for path in old if path.resolve() in inputs]:
        raise UserError(f"--overwrite would delete {used[0]}, which this run starts from; choose another --proj_dir")
    return old


def delete(folder: Path, old: list[Path], used: Path) -> None:
    """Delete `outdated` files, and say which; of them not those of the data that is `used`."""
    kept = {path.resolve() for path in data_source.files_of(str(used))}
    going = [path for path in old if path.resolve() not in kept]
    for path in going:
        path.unlink()
    if going:
        say(f"deleted: {folders.names(folder, going)} (of the earlier run in {folder})")


def check_source(c: TrainConfig, folder: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raises UserError if data_file is not what the run before was made from, and `allow_changes` is not given: before it is converted."""
    if (
        before
        and not c.allow_changes
        and any(line.startswith("data file") for line in run_manifest.changes(before, now))
    ):
        refuse_changes(folder, run_manifest.changes(before, now))


def find(
    c: TrainConfig,
    folder: Path,
    before: dict[str, Any] | None,
    now: dict[str, Any],
    trained: Mapping[str, torch.nn.Parameter],
) -> State | None:
    """The state to continue from; None for a new run, or one that ended before its first state. Completes `now`, the manifest, from `before`.

    Args:
        trained: the parameters that this run trains, by name.

    Raises:
        UserError: flags or data would make it another run, and `allow_changes` is not given, or the state cannot serve them; no valid state.
    """
    now["id"] = secrets.token_hex(8)
    if not before:
        return None
    now["id"] = before.get("id", now["id"])
    changed = run_manifest.changes(before, now)
    if changed and not c.allow_changes:
        refuse_changes(folder, changed)
    state = state_files.newest(folder)
    if state is None and (found := folders.progress(folder, before)):
        raise UserError(
            f"{folder} contains {found}, so the run cannot be resumed. Choose one: {folders.how_to_continue(c, folder)}"
        )
    if state:
        _check_serves(c, folder, state, now, trained, changed)
        now["state_saved"] = True
    now["changed"] = before.get("changed", [])
    if changed:
        now["changed"] = [*now["changed"], {"after_step": state.step if state else 0, "changes": changed}]
    elif not now["changed"]:
        del now["changed"]
    step = state.step if state else schedule.first_step(c)
    left = schedule.first_step(c) + schedule.total_steps(c) - step
    say(
        f"continuing from step {step:,}: {max(0, left):,} steps left"
        + "".join(f"\n  changed: {line}" for line in changed)
    )
    if left > 0:
        _say_rates(run_manifest.flags_of(before), c, step)
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


def refuse_changes(folder: Path, changed: list[str]) -> None:
    """Raises UserError: these changes would make the run in the folder another one."""
    raise UserError(
        f"{folder} contains a run with other flags or data (then → now):\n  "
        + "\n  ".join(changed)
        + "\nChoose one: use the old values; --allow_changes, to continue with the new ones; --overwrite, to start over; another --proj_dir, for"
        " another run"
    )


def _check_serves(
    c: TrainConfig,
    folder: Path,
    state: State,
    now: dict[str, Any],
    trained: Mapping[str, torch.nn.Parameter],
    changed: list[str],
) -> None:
    """Raises UserError if a state is another run's, or if its tensors are not those that this run trains."""
    path = state_files.folder_of(folder) / f"step-{state.step}.pt"
    if state.run.get("id", now["id"]) != now["id"]:
        raise UserError(
            f"{path}: a training state of another run; move it away, and run again to continue from a state of this run"
        )
    shapes = {name: list(parameter.shape) for name, parameter in trained.items()}
    stored = {name: list(weight.shape) for name, weight in state.weights.items()}
    wrong = [
        *(f"it has no {name}" for name in shapes.keys() - stored.keys()),
        *(f"it has {name}, which this run does not train" for name in stored.keys() - shapes.keys()),
        *(
            f"{name} is {stored[name]}, not {shapes[name]}"
            for name in shapes.keys() & stored.keys()
            if shapes[name] != stored[name]
        ),
    ]
    kinds = {"adam" if "exp_avg" in moments else "adafactor" for moments in state.optimizer.values() if moments}
    if kinds - {c.optimizer}:
        wrong.insert(0, f"it was saved with --optimizer {kinds.pop()}, and this run has {c.optimizer}")
    if not wrong:
        return
    causes = [line for line in changed if line.startswith(_SHAPING)]
    if not causes:
        raise UserError(
            f"{path}: not a training state of this run ({sorted(wrong)[0]}); move it away, and run again to continue from another"
        )
    raise UserError(
        "--allow_changes: the training state cannot be used with\n  "
        + "\n  ".join(causes)
        + f"\n({path}: {sorted(wrong)[0]}.) Use the old values, or start a new run from a checkpoint of this one in another --proj_dir"
    )
