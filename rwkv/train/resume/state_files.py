"""Files of training states: written atomically, the last two are kept, and the newest valid one is
loaded.
"""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv import checkpoint
from rwkv.errors import UserError
from rwkv.files import atomic_write, stale_temporaries
from rwkv.train.console import say
from rwkv.train.resume.run_state import FORMAT, State, join, split
from rwkv.weights import pth

KEPT = 2
_OURS = re.compile(r"step-\d+\.pt(\.corrupt|\.damaged)?|\.step-\d+\.pt\..*\.tmp")
_TRANSIENT = {errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EINTR}
_KINDS = {"step": int, "samples": int, "weights": dict, "optimizer": dict, "scaler": dict, "rng": list, "run": dict}


def folder_of(run: Path) -> Path:
    """The subfolder for training states of a run's folder."""
    return run / "resume"


def states(run: Path) -> list[Path]:
    """Paths of a run's training states, newest first."""
    found = [
        (int(match[1]), path)
        for path in folder_of(run).glob("step-*.pt")
        if (match := re.fullmatch(r"step-(\d+)\.pt", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def write(run: Path, state: State) -> Path:
    """Write a state; then delete all but the last two, and temporary files of killed runs. Returns
    its path.

    Raises:
        UserError: the disk is full; earlier states are unchanged.
    """
    path = folder_of(run) / f"step-{state.step}.pt"
    values, tensors = split(vars(state))
    with atomic_write(path) as temporary:
        # as text, because the restricted loader of torch 1.13.1 does not support floats
        checkpoint.save({"format": FORMAT, "tensors": tensors, "text": json.dumps(values)}, temporary)
    for old in states(run)[KEPT:]:
        old.unlink()
    for other in folder_of(run).glob(".step-*.tmp"):
        for stale in stale_temporaries(other.with_name(other.name[1:].rsplit(".", 2)[0])):
            stale.unlink(missing_ok=True)
    return path


def leftovers(run: Path) -> list[Path]:
    """All files of training states: valid, corrupt, and temporary files of killed runs."""
    return sorted(path for path in folder_of(run).glob("*") if _OURS.fullmatch(path.name))


def newest(run: Path) -> State | None:
    """Load the newest valid state; None if there is none. Corrupt ones are renamed to `.corrupt`
    and skipped with a warning.

    Raises:
        UserError: a state cannot be read, or was written by a later version of this program.
    """
    for path in states(run):
        try:
            return read(path)
        except CorruptState as error:
            renamed = path.rename(f"{path}.corrupt")
            say(f"warning: {path} is corrupt ({error}); renamed to {renamed.name}, using the previous state")
    return None


class CorruptState(ValueError):
    """A file is truncated, modified, or not a training state."""


def read(path: Path) -> State:
    """Load a state, with memory-mapped tensors if possible. No code in the file is executed.

    Raises:
        CorruptState: the file is corrupt, or not a training state.
        UserError: the file cannot be read, or was written by a later version.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would block
        raise CorruptState("a folder, pipe or device, not a file")
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise UserError(
            f"{path}: this training state cannot be read ({error.strerror}); make it readable and run again"
        ) from error
    try:
        content = pth.load(path, verify=True)  # checks the CRC-32 of every tensor
    except (UserError, MemoryError):
        raise
    except Exception as error:  # corrupt bytes raise almost anything
        if (
            (isinstance(error, OSError) and error.errno in _TRANSIENT)
            or "memory" in str(error)
            or "alloc" in str(error)
        ):
            raise UserError(
                f"{path}: this training state cannot be read ({error}); it may be valid: run again"
            ) from error
        raise CorruptState((str(error).splitlines() or [type(error).__name__])[0]) from error
    return _state(content, path)


def _state(content: Any, path: Path) -> State:
    """Build a state from the content of its file, and check the types of its parts."""
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise CorruptState("not a training state")
    if content["format"] > FORMAT:
        raise UserError(f"{path}: written by a later version of this program; continue this run with that version")
    try:
        parts = join(json.loads(content["text"]), content["tensors"])
        state = State(**parts)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CorruptState(f"not a training state ({type(error).__name__}: {error})") from error
    if not (
        all(isinstance(getattr(state, name), kind) for name, kind in _KINDS.items())
        and state.step >= 0
        and state.samples >= 0
        and all(isinstance(x, Tensor) for x in state.weights.values())
        and all(isinstance(x, dict) for x in (*state.optimizer.values(), *state.rng))
        and all({"torch", "cuda", "numpy", "python"} <= rng.keys() for rng in state.rng)
        and isinstance(state.run.get("flags"), dict)
    ):
        raise CorruptState("a training state whose parts have wrong types")
    return state
