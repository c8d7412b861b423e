"""The resumable states of a run, on disk: each whole or not at all, the last two kept, the newest that is sound taken."""

import json
import re
from pathlib import Path

from rwkv import checkpoint
from rwkv.errors import UserError
from rwkv.files import abandoned, whole
from rwkv.train.state import FORMAT, State, join, split
from rwkv.train.words import say
from rwkv.weights import pth

KEPT = 2


def folder_of(run: Path) -> Path:
    """Where the run in this folder keeps its states."""
    return run / "resume"


def states(run: Path) -> list[Path]:
    """The states of a run, newest first."""
    found = [(int(match[1]), path) for path in folder_of(run).glob("step-*.pt") if (match := re.fullmatch(r"step-(\d+)\.pt", path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def write(run: Path, state: State) -> Path:
    """Write a state, then drop all but the last two, and what a killed run left half written.

    Raises:
        UserError: the disk is full. What was there before is untouched.
    """
    path = folder_of(run) / f"step-{state.step}.pt"
    shell, tensors = split(vars(state))
    with whole(path) as temporary:
        # torch 1.13.1's loader that runs no code knows no floats: what is no tensor is text.
        checkpoint.save({"format": FORMAT, "tensors": tensors, "text": json.dumps(shell)}, temporary)
    for old in states(run)[KEPT:]:
        old.unlink()
    for left in folder_of(run).glob(".step-*.tmp"):
        for stale in abandoned(left.with_name(left.name[1:].rsplit(".", 2)[0])):
            stale.unlink(missing_ok=True)
    return path


def newest(run: Path) -> State | None:
    """The newest state that is sound; None if there is none. A damaged one is put aside as `.damaged`, and said.

    Raises:
        UserError: there are states, and none is sound.
    """
    damaged = []
    for path in states(run):
        try:
            state = read(path)
        except ValueError as error:
            aside = path.rename(f"{path}.damaged")
            say(f"warning: {path} is damaged ({error}); it is now {aside.name}, and the run goes on from the state before it")
            damaged.append(aside)
        else:
            return state
    if damaged:
        raise UserError(
            f"{folder_of(run)}: no state is sound ({', '.join(path.name for path in damaged)}). Go on from the weights alone with --load_model"
            " and --epoch_begin in another --proj_dir, or start over with --overwrite"
        )
    return None


def read(path: Path) -> State:
    """A state from its file, where it can be still lying in it. Runs no code from it.

    Raises:
        FileFormatError: not the bytes that were written: truncated, or a checksum that is wrong.
        UserError: written by a later version.
    """
    content = pth.load(path, verify=True)  # with torch's CRC-32 of every tensor
    if content["format"] != FORMAT:
        raise UserError(f"{path}: written by a later version of this program; go on with that one")
    return State(**join(json.loads(content["text"]), content["tensors"]))
