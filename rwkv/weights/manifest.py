"""`<file>.json` beside a file of weights, as it is found: written by us, by hand or by somebody hostile. Read with its types checked."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rwkv.errors import UserError
from rwkv.files import regular, sha256

_LARGEST = 16 << 20  # bytes
_ALPHA = 1e6  # alpha is some 1 to 1000; the product of more with a weight says nothing
_RANK = 1 << 16

PathLike = str | os.PathLike


def path_of(path: PathLike) -> Path:
    """`<path>.json`."""
    return Path(f"{path}.json")


def read(path: PathLike) -> dict[str, Any]:
    """What `<path>.json` says of the checkpoint; empty if there is none, as with upstream's files.

    Raises:
        UserError: it is not an object in JSON.
    """
    return read_json(path_of(path)) if os.path.lexists(path_of(path)) else {}


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises UserError."""
    with regular(path, "manifest") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise UserError(
            f"{path}: larger than {_LARGEST >> 20} MiB, which no manifest is; delete it, or give the right one"
        )
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise UserError(f"{path}: not a manifest: its arrays or objects are nested too deeply") from error
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}). Fix it, or delete it and give what it says by flags"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: contains a JSON {_kind(found)}, not an object that describes a checkpoint")
    return found


def _kind(value: Any) -> str:
    names = {
        dict: "object",
        list: "array",
        str: "string",
        bool: "Boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def check_adapter(manifest: dict[str, Any], where: PathLike, parts: Iterable[str]) -> dict[str, Any]:
    """The manifest of an adapter, every value that is used of the right type and in range.

    Args:
        where: the manifest's file, for messages.
        parts: names that its `parts` may have.

    Raises:
        UserError: a value that cannot be one of an adapter's, by its key.
    """

    def wrong(key: str, wanted: str) -> UserError:
        value = manifest[key]
        shown = _kind(value) if isinstance(value, dict | list) else repr(value)[:80]
        return UserError(
            f"{where}: its {key} is {shown}, not {wanted}. Fix it there, or delete the file and give the value by flags"
        )

    if "kind" in manifest and manifest["kind"] != "adapter":
        raise UserError(
            f"{where}: its kind is {str(manifest['kind'])[:80]!r}: the file that it describes is not a LoRA adapter; give an adapter"
        )
    if "version" in manifest and manifest["version"] != "4":
        raise wrong("version", '"4", the RWKV version that can be used here')
    if "alpha" in manifest and not (is_number(manifest["alpha"]) and 0 < manifest["alpha"] <= _ALPHA):
        raise wrong("alpha", f"a number above 0 and up to {_ALPHA:,.0f}")
    if "r" in manifest and not (type(manifest["r"]) is int and 0 < manifest["r"] <= _RANK):
        raise wrong("r", "a positive integer")
    known = set(parts)
    if "parts" in manifest and not (
        isinstance(manifest["parts"], list) and all(isinstance(x, str) and x in known for x in manifest["parts"])
    ):
        raise wrong("parts", f"a list of {', '.join(sorted(known))}")
    for key in ("base", "base_sha256"):
        if manifest.get(key, "") is None:  # known to be unknown
            manifest = {k: v for k, v in manifest.items() if k != key}
    if "base" in manifest and not _is_path(manifest["base"]):
        raise wrong("base", "the path of a file")
    if "base_sha256" in manifest and not (
        isinstance(manifest["base_sha256"], str) and re.fullmatch("[0-9a-fA-F]{64}", manifest["base_sha256"])
    ):
        raise wrong("base_sha256", "a SHA-256 of 64 hexadecimal digits")
    return manifest


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False


def _is_path(value: Any) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeError:
        return False
    return True


def portable(base: PathLike, beside: PathLike) -> str:
    """The path of a base for the manifest beside a file: relative to that file's folder, so that both may be moved and nothing is said about this machine."""
    base, folder = Path(base), Path(beside).parent
    return os.path.relpath(base.parent.resolve() / base.name, folder.resolve())


def without_absolute_paths(manifest: Mapping[str, Any], beside: PathLike) -> dict[str, Any]:
    """A manifest whose absolute paths, which say nothing on another machine and too much about this one, are relative to the manifest's folder, as `base`
    always is."""

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, str) and value and (key == "base" or os.path.isabs(value)):
            return portable(value, beside)
        return {k: moved(k, x) for k, x in value.items()} if isinstance(value, dict) else value

    return {key: moved(key, value) for key, value in manifest.items()}


def find_base(manifest: dict[str, Any], adapter: PathLike) -> Path | None:
    """The base that the manifest of an adapter names: relative to the adapter's folder, relative to the working directory (as older manifests have it),
    or of the same name beside the adapter. Where several exist, the one with the right SHA-256; None if none does."""
    if not manifest.get("base"):
        return None
    named, folder = Path(manifest["base"]), Path(adapter) if os.path.isdir(adapter) else Path(adapter).parent
    found: list[Path] = []
    for path in (folder / named, named, folder / named.name):
        try:
            if os.path.isfile(path) and not any(path.samefile(other) for other in found):
                found.append(path)
        except OSError:  # a name too long, a folder that may not be entered
            continue
    if len(found) > 1 and (expected := manifest.get("base_sha256")):
        found.sort(key=lambda path: sha256(path) != expected.lower())
    return found[0] if found else None
