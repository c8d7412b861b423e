"""metrics.jsonl, one line per optimizer step: read with constant memory, truncated on resume,
repaired if corrupt.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from rwkv.files import atomic_write
from rwkv.train.console import say

NAME = "metrics.jsonl"
_MAX_LINE = 1 << 20  # bytes; a longer line was not written by a run


def parse(raw: bytes) -> dict[str, Any] | None:
    """Parse a line; None if it is invalid: not JSON, without step, loss or lr, or with values of
    wrong types.
    """
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
    loss, val_loss = line["loss"], line.get("val_loss")  # null for NaN or Inf
    return (
        line
        if _number(line["lr"]) and (loss is None or _number(loss)) and (val_loss is None or _number(val_loss))
        else None
    )


def _number(value: Any) -> bool:
    return type(value) in (float, int) and math.isfinite(value)


def read(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Iterate over the complete lines of the file: (end offset, bytes, result of `parse`)."""
    with open(path, "rb") as file:
        end = 0
        while raw := file.readline(_MAX_LINE):
            cut = False
            while not raw.endswith(b"\n") and (more := file.readline(_MAX_LINE)):
                end, raw, cut = end + len(raw), more, True
            end += len(raw)
            if raw.endswith(b"\n"):
                yield end, raw, None if cut else parse(raw)


def keep_steps(path: Path, last: int, begin: int, add: Callable[[dict[str, Any]], None]) -> None:
    """Truncate the file after step `last`, and call `add` with every remaining line, in order.

    Invalid and repeated lines (after a power failure, concurrent writers or edits) are dropped with
    a warning, and the original file is saved as metrics.jsonl.corrupt. A warning is also printed if
    lines of steps after `begin` are missing. The file is read once, line by line, and rewritten
    only if lines within it are dropped.
    """
    end, newest, kept, invalid = 0, 0, 0, 0
    for after, _, line in read(path) if path.exists() else ():
        if line is None or line["step"] <= newest:
            invalid += 1
            continue
        if line["step"] > last:
            break
        end, newest, kept = after, line["step"], kept + (line["step"] > begin)
        add(line)
    if invalid:
        backup = _unused(path.with_name(f"{path.name}.corrupt"))
        with atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                _copy(path, file.write, last)
            os.replace(path, backup)
        say(f"warning: {path}: dropped {invalid:,} invalid or repeated lines; the original file is now {backup.name}")
    elif path.exists() and end < path.stat().st_size:
        with open(path, "r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    if missing := last - begin - kept:
        say(
            f"warning: {path} has no line for {missing:,} of the {last - begin:,} completed steps; the run itself is not affected"
        )


def _copy(path: Path, write: Callable[[bytes], Any], last: int) -> None:
    newest = 0
    for _, raw, line in read(path):
        if line is not None and newest < line["step"]:
            if line["step"] > last:
                return
            newest = line["step"]
            write(raw)


def _unused(path: Path) -> Path:
    """The first of path, path.2, path.3, … that does not exist."""
    number, found = 1, path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}.{number}")
    return found
