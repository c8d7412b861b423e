"""Commands to print for the user, in the form in which this process was started: make,
container or script.

The Makefile sets RWKV_MAKE (`make` with the variables that select the Python) and RWKV_MAKE_FOLDER
(for make -C); compose.yaml and the image's entry point set RWKV_CONTAINER (`docker compose run
--rm`, or the entry point itself). Otherwise a command is this Python and the script.
"""

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SCRIPTS = {"inspect": "inspect_data", "merge": "merge_lora", "model": "fetch"}


def flags(*arguments: object) -> str:
    """Arguments quoted for a shell: `--data_file 'a b'`."""
    return shlex.join(map(str, arguments))


def command(job: str, *arguments: object) -> str:
    """The command that runs a job (`lora`, `merge`, `generate`, …) with these arguments: a make
    target, compose service or script.

    Arguments are quoted, so that it can be pasted into a shell in the same folder.
    """
    if prefix := _make():
        words = [f"{prefix} {job}"]
        if job == "model" and arguments[:1] == ("--model",):  # this target has a variable for it
            words, arguments = [*words, f"MODEL={shlex.quote(str(arguments[1]))}"], arguments[2:]
        return " ".join([*words, *([_make_variable("ARGS", flags(*arguments))] if arguments else [])])
    if service := os.environ.get("RWKV_CONTAINER"):
        return f"{service} {flags(job, *arguments)}"
    script = _short(ROOT / "scripts" / f"{_SCRIPTS.get(job, job)}.py")
    return _path() + flags(_short(sys.executable), script, *arguments)


def target(name: str) -> str:
    """The command for a make target in the environment in use, such as `make kernels`."""
    if prefix := _make():
        return f"{prefix} {name}"
    if os.environ.get("RWKV_CONTAINER"):
        return f"make image, outside the container, which runs make {name}"
    stack = {ROOT / ".venv": "", ROOT / ".venv-modern": " STACK=modern"}.get(Path(sys.prefix))
    return f"make {name}" + (f" PY={shlex.quote(sys.executable)}" if stack is None else stack)


def output(path: str) -> str:
    """An output path for printed commands: in a container only in out/ and models/."""
    if not os.environ.get("RWKV_CONTAINER") or path.startswith(("out/", "models/")):
        return path
    return f"out/{Path(path).name}"


def _path() -> str:
    """`PYTHONPATH=… ` if this package is found through it: it may be set for this process alone."""
    entries = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return f"PYTHONPATH={shlex.quote(_short(ROOT))} " if str(ROOT) in map(os.path.abspath, entries) else ""


def _make() -> str:
    """`make` with its variables, and -C if it was started from another folder; empty if this is not
    a make job.
    """
    words = os.environ.get("RWKV_MAKE", "")
    folder = os.environ.get("RWKV_MAKE_FOLDER")
    return words.replace("make", f"make -C {shlex.quote(folder)}", 1) if words and folder else words


def _short(path: str | Path) -> str:
    """A path relative to the current folder if it is inside it, else absolute."""
    absolute = os.path.abspath(path)
    inside = os.path.relpath(absolute)
    return absolute if inside.startswith(os.pardir) else inside


def _make_variable(name: str, value: str) -> str:
    value = value.replace("$", "$$")  # make expands it once
    if any(letter in value for letter in '"\\`$!'):
        return f"{name}={shlex.quote(value)}"
    return f'{name}="{value}"'
