"""Decide whether to resume the run in the folder, start a new one, or reject the command; find the
training state to resume from; prepare the folder.
"""

import contextlib
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.locks import exclusive
from rwkv.models import RWKV
from rwkv.train import data_source, setup
from rwkv.train import folder as folders
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.resume import run_manifest, state_files
from rwkv.train.resume.run_state import State
from rwkv.train.run import NEW_BASE, Run
from rwkv.train.runtime.lightning import rank_zero_only

# changes (see run_manifest.changes) that affect which tensors a state has
_SHAPING = ("trained:", "model:", "--lora_r:", "--lora_parts:", "--use_dora:", "--optimizer:")


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Lock a run's folder while the block runs (rank 0 only). Raises UserError if another process
    has locked it.
    """
    if rank_zero_only.rank > 0:
        return contextlib.nullcontext()
    return exclusive(folder / ".lock", folder, "choose another --proj_dir")


def run_to_resume(c: TrainConfig) -> dict[str, Any] | None:
    """The manifest of the run to resume; None for a new run, and on all ranks but rank 0.

    A run with another epoch_begin than that in the folder is a new run, started from weights only.

    Raises:
        UserError: the folder contains a run that cannot be resumed.
    """
    if rank_zero_only.rank > 0:
        return None
    folder = c.folder
    folders.check_paths(folder)
    before = None if c.overwrite else run_manifest.read(folder)
    if before and before["flags"]["epoch_begin"] == c.epoch_begin:
        return before
    if not c.overwrite and not c.epoch_begin and (old := folders.run_files(folder)):
        raise UserError(
            f"{folder} contains files of an earlier run ({folders.names(folder, old)}) but no {run_manifest.NAME}, so the run cannot be resumed."
            f" Choose one: {folders.how_to_continue(c)}"
        )
    folders.check_overwrites(c)
    return None


def new_base(c: TrainConfig, before: dict[str, Any] | None) -> Path | None:
    """The base model created by an earlier start of this LoRA run; None for a new run, or one with
    load_model.

    Raises:
        UserError: it is missing, but an adapter was trained on it.
    """
    path = c.folder / NEW_BASE
    if c.load_model or c.overwrite or not c.adapter:
        return None
    if rank_zero_only.rank > 0:  # weights are broadcast from rank 0 in any case
        return path if path.is_file() else None
    if not before or not state_files.states(c.folder):  # nothing has been trained on it
        return None
    if not path.is_file():
        raise UserError(
            f"{path}: missing; the adapter of this run is trained on it. Restore it, or use --overwrite to start over"
        )
    return path


def outdated(c: TrainConfig, before: dict[str, Any] | None) -> tuple[Path, ...]:
    """Files of an earlier run in the folder, to be deleted after all checks have passed."""
    if rank_zero_only.rank > 0 or before:
        return ()
    old = folders.own_files(c.folder) if c.overwrite else state_files.leftovers(c.folder)
    inputs = {Path(path).resolve() for path in (c.load_model, c.adapter.lora_load if c.adapter else "") if path}
    if used := [path for path in old if path.resolve() in inputs]:
        raise UserError(f"--overwrite would delete {used[0]}, which this run starts from; choose another --proj_dir")
    return tuple(old)


def delete(run: Run, used: Iterable[str]) -> None:
    """Delete the run's `outdated` files, except those of the data with the prefixes `used`; report
    which.
    """
    kept = {path.resolve() for prefix in used for path in data_source.files_of(prefix)}
    deleted = [path for path in run.outdated if path.resolve() not in kept]
    for path in deleted:
        path.unlink()
    if deleted:
        say(f"deleted: {folders.names(run.folder, deleted)} (of the earlier run in {run.folder})")


def check_source(run: Run, manifest: dict[str, Any]) -> None:
    """Raise UserError if data_file differs from that of the resumed run, unless `allow_changes` is
    given. Called before it is converted.
    """
    before = _comparable_manifest(run)
    if before and not run.flags.allow_changes:
        changed = run_manifest.changes(before, manifest)
        if any(line.startswith("data file") for line in changed):
            reject_changes(run.folder, changed)


def begin(run: Run, model: RWKV, manifest: dict[str, Any]) -> State | None:
    """Find the state to resume from, and prepare the folder of a new run. Adds to the manifest what
    it inherits from the resumed run, and a base model that is written.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state, inherited = find_state(run, manifest, trained)
    manifest.update(inherited)
    if rank_zero_only.rank == 0:
        delete(run, [x["prefix"] for x in (manifest["data"], manifest["validation"]) if x])
        run.folder.mkdir(parents=True, exist_ok=True)
        if not run.before:
            run_manifest.write(run.folder, manifest)
        if run.adapter and not run.base:
            manifest["base"] = setup.write_base(run, model)
            if not run.before:
                run_manifest.write(run.folder, manifest)
    return state


def find_state(
    run: Run, manifest: dict[str, Any], trained: Mapping[str, torch.nn.Parameter]
) -> tuple[State | None, dict[str, Any]]:
    """Find the training state to resume from.

    Args:
        manifest: of this run.
        trained: the parameters that this run trains, by name.

    Returns:
        The state, None if the run has not saved one; and entries that the manifest inherits from
        the resumed run.

    Raises:
        UserError: flags or data have changed without `allow_changes`; the state does not match
            them; there is no valid state.
    """
    c, folder, before = run.flags, run.folder, _comparable_manifest(run)
    if not before:
        return None, {"id": secrets.token_hex(8)}
    inherited: dict[str, Any] = {"id": before.get("id") or secrets.token_hex(8)}
    changed = run_manifest.changes(before, manifest)
    if changed and not c.allow_changes:
        reject_changes(folder, changed)
    state = state_files.newest(folder)
    if state is None and (found := folders.describe_loss_of_states(folder, before)):
        raise UserError(
            f"{folder} contains {found}, so the run cannot be resumed. Choose one: {folders.how_to_continue(c)}"
        )
    if state:
        _check_state(c, state, inherited["id"], trained, changed)
        inherited |= {"state_saved": True, "best": state.run.get("best")}
    history = before.get("changed", [])
    if changed:
        history = [*history, {"after_step": state.step if state else 0, "changes": changed}]
    if history:
        inherited["changed"] = history
    step = state.step if state else schedule.first_step(c)
    left = schedule.first_step(c) + schedule.total_steps(c) - step
    say(
        f"continuing from step {step:,}: {max(0, left):,} steps left"
        + "".join(f"\n  changed: {line}" for line in changed)
    )
    if left > 0:
        _report_rate_jump(run_manifest.flags_of(before), c, step)
    return state, inherited


def _comparable_manifest(run: Run) -> dict[str, Any] | None:
    """The manifest of the resumed run for comparison, with `base` set as in this run if it was
    created by the run.
    """
    if not run.before or run.flags.load_model or run.before["flags"].get("load_model"):
        return run.before
    if run.new_base:
        return run.before | {"base": run.before["base"] or run.base}  # not recorded by earlier versions
    return run.before | {"base": None}  # killed before its first state: the base will be created again


def _report_rate_jump(old: TrainConfig, new: TrainConfig, step: int) -> None:
    """Report a jump of the learning rate caused by a changed --epoch_count."""
    then, now = (schedule.learning_rate(x, step - schedule.first_step(new)) for x in (old, new))
    if old.epoch_count != new.epoch_count and then != now:
        trend = f" and then {'falls' if new.lr_final < new.lr_init else 'rises'} until epoch {new.epoch_count}"
        say(
            f"note: --epoch_count changed from {old.epoch_count} to {new.epoch_count}, so the learning rate jumps from {then:.3g} to {now:.3g} now{trend}."
            " For a constant learning rate, set --lr_init and --lr_final to the same value"
        )


def reject_changes(folder: Path, changed: list[str]) -> None:
    """Raise UserError, which lists the changes and what the user can do."""
    raise UserError(
        f"{folder} contains a run with other flags or data (then → now):\n  "
        + "\n  ".join(changed)
        + "\nChoose one: use the old values; --allow_changes to continue with the new ones; --overwrite to start over; another --proj_dir for"
        " a new run"
    )


def _check_state(
    c: TrainConfig,
    state: State,
    run_id: str,
    trained: Mapping[str, torch.nn.Parameter],
    changed: list[str],
) -> None:
    """Raise UserError if a state belongs to another run, or its tensors do not match the
    parameters that this run trains.
    """
    path = state_files.folder_of(c.folder) / f"step-{state.step}.pt"
    if state.run.get("id", run_id) != run_id:
        raise UserError(
            f"{path}: a training state of another run; move it away, and run again to resume from a state of this run"
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
    saved = _optimizer_of(state)
    if saved not in ("", c.optimizer):
        wrong.insert(0, f"it was saved with --optimizer {saved}, but this run has {c.optimizer}")
    if not wrong:
        return
    causes = [line for line in changed if line.startswith(_SHAPING)]
    if not causes:
        raise UserError(
            f"{path}: does not match this run ({sorted(wrong)[0]}); move it away, and run again to resume from another state"
        )
    raise UserError(
        "--allow_changes: the training state cannot be used with\n  "
        + "\n  ".join(causes)
        + f"\n({path}: {sorted(wrong)[0]}.) Use the old values, or start a new run from a checkpoint of this one in another --proj_dir"
    )


def _optimizer_of(state: State) -> str:
    """The --optimizer that saved a state; empty if no step has been made."""
    if not (keys := {key for moments in state.optimizer.values() for key in moments}):
        return ""
    marks = {"exp_avg": "adam", "momentum": "muon", "moment1": "adamw8bit"}  # Muon's AdamW has moment1 too
    return next((name for key, name in marks.items() if key in keys), "adafactor")
