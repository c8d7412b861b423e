"""metrics.jsonl, one line per optimizer step, as a file: read in bounded memory, truncated where a run resumes, and never a reason to refuse one."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from rwkv.files import whole
from rwkv.train.console import say

NAME = "metrics.jsonl"
_MAX_DOCUMENT = 1 << 20  # bytes; a longer line was not written by a run


def parse(raw: bytes) -> dict[str, Any] | None:
    """A line as the dictionary that was written; None if it is not one: not JSON, without step, loss or learning rate, or with values of another type."""
    try:
        line = orjson.loads(raw)
    except ValueError:
        return None
    if (
        not isinstance(line, dict)
        or type(line.get("step")) is not int
        or line["step"] < 1
        or not {"loss", "lr"} <= line.keys()
    ):
        return None
    loss, val_loss = line["loss"], line.get("val_loss")  # null: NaN or Inf
    return (
        line
        if _number(line["lr"]) and (loss is None or _number(loss)) and (val_loss is None or _number(val_loss))
        else None
    )


def _number(value: Any) -> bool:
    return type(value) in (float, int) and math.isfinite(value)


def read(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """The lines of the file that have an end: where each ends in the file, its bytes, and what `parse` makes of them."""
    with open(path, "rb") as file:
        end = 0
        while raw := file.readline(_MAX_DOCUMENT):
            cut = False
            while not raw.endswith(b"\n") and (more := file.readline(_MAX_DOCUMENT)):
                end, raw, cut = end + len(raw), more, True
            end += len(raw)
            if raw.endswith(b"\n"):
                yield end, raw, None if cut else parse(raw)


def keep_steps(path: Path, last: int, begin: int, add: Callable[[dict[str, Any]], None]) -> None:
    """Truncate the file after step `last`, and hand every line that remains to `add`, in order. A run that began after step `begin` is expected to have
    a line for every later step; if not, this is said.

    What is no line of a run (a power cut, two writers, an editor) is dropped; the file as it was is then kept beside it as metrics.jsonl.corrupt,
    and this is said. The file is read once, a line at a time; it is rewritten only where lines are dropped in its middle.
    """
    end, newest, kept, wrong = 0, 0, 0, 0
    for after, _, line in read(path) if path.exists() else ():
        if line is None or line["step"] <= newest:
            wrong += 1
            continue
        if line["step"] > last:
            break
        end, newest, kept = after, line["step"], kept + (line["step"] > begin)
        add(line)
    if wrong:
        aside = _free(path.with_name(f"{path.name}.corrupt"))
        with whole(path) as temporary:
            with open(temporary, "wb") as file:
                _copy(path, file.write, last)
            os.replace(path, aside)
        say(
            f"warning: {path}: {wrong:,} invalid or repeated lines were dropped; the file as it was is now {aside.name}"
        )
    elif path.exists() and end < path.stat().st_size:
        with open(path, "r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    if missing := last - begin - kept:
        say(
            f"warning: {path} has no line for {missing:,} of the {last - begin:,} steps made so far; the run itself is not affected"
        )


def _copy(path: Path, write: Callable[[bytes], Any], last: int) -> None:
    newest = 0
    for _, raw, line in read(path):
        if line is not None and newest < line["step"]:
            if line["step"] > last:
                return
            newest = line["step"]
            write(raw)


def _free(path: Path) -> Path:
    """The path, or the first of path.2, path.3, … that does not exist."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}.{number}")
    return found
