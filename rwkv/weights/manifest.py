"""Read and validate the manifest `<file>.json` beside a file of weights; it may be hand-written or
malicious.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rwkv.errors import UserError
from rwkv.files import open_regular, sha256

_MAX_BYTES = 16 << 20
_MAX_ALPHA = 1e6  # typical values are 1 to 1000
_MAX_RANK = 1 << 16

PathLike = str | os.PathLike


def path_of(path: PathLike) -> Path:
    """`<path>.json`."""
    return Path(f"{path}.json")


def read(path: PathLike) -> dict[str, Any]:
    """The manifest `<path>.json`; empty if there is none, as with upstream's files.

    Raises:
        UserError: it is not a JSON object.
    """
    return read_json(path_of(path)) if os.path.lexists(path_of(path)) else {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises UserError if the file contains anything else."""
    with open_regular(path, "manifest") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UserError(
            f"{path}: larger than {_MAX_BYTES >> 20} MiB, too large for a manifest; delete it, or replace it with the correct one"
        )
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise UserError(
            f"{path}: not a manifest: its arrays or objects are nested too deeply; delete it and pass its values as flags, or restore it"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}). Fix it, or delete it and pass its values as flags"
        ) from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: contains a JSON {_kind(found)}, not an object that describes a checkpoint; delete it and pass its values as flags, or restore it"
        )
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


def check_adapter(manifest: dict[str, Any], where: PathLike, parts: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """Validate type and range of every value used from an adapter's manifest.

    Args:
        where: the manifest's path, for messages.
        parts: valid names in its `parts`, by RWKV version.

    Raises:
        UserError: an invalid value, with its key.
    """

    def wrong(key: str, wanted: str) -> UserError:
        value = manifest[key]
        shown = _kind(value) if isinstance(value, dict | list) else repr(value)[:80]
        return UserError(
            f"{where}: its {key} is {shown}, not {wanted}. Fix it there, or delete the file and pass the value as a flag"
        )

    if "kind" in manifest and manifest["kind"] not in ("adapter", "state"):
        raise UserError(
            f"{where}: its kind is {str(manifest['kind'])[:80]!r}: the file that it describes is not a LoRA adapter; use an adapter"
        )
    if "version" in manifest and manifest["version"] not in [*parts]:
        raise wrong("version", f"a supported RWKV version ({', '.join(parts)})")
    if "alpha" in manifest and not (is_number(manifest["alpha"]) and 0 < manifest["alpha"] <= _MAX_ALPHA):
        raise wrong("alpha", f"a number above 0 and up to {_MAX_ALPHA:,.0f}")
    if "r" in manifest and not (type(manifest["r"]) is int and 0 < manifest["r"] <= _MAX_RANK):
        raise wrong("r", "a positive integer")
    possible = [parts[manifest["version"]]] if "version" in manifest else parts.values()
    known = {name for names in possible for name in names}
    if "parts" in manifest and not (
        isinstance(manifest["parts"], list) and all(isinstance(x, str) and x in known for x in manifest["parts"])
    ):
        raise wrong("parts", f"a list of {', '.join(sorted(known))}")
    for key in ("base", "base_sha256"):
        if manifest.get(key, "") is None:  # explicitly unknown
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
    except OverflowError:  # an integer beyond the range of a float
        return False


def _is_path(value: Any) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeError:
        return False
    return True


def relative_path(base: PathLike, beside: PathLike) -> str:
    """The path of a base model relative to the folder of `beside`, so that both can be moved and no
    absolute path is published.
    """
    base, folder = Path(base), Path(beside).parent
    return os.path.relpath(base.parent.resolve() / base.name, folder.resolve())


def without_absolute_paths(manifest: Mapping[str, Any], beside: PathLike) -> dict[str, Any]:
    """The manifest with absolute paths, and `base` always, made relative to its folder (they would
    disclose local paths).
    """

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, str) and value and (key == "base" or os.path.isabs(value)):
            return relative_path(value, beside)
        return {k: moved(k, x) for k, x in value.items()} if isinstance(value, dict) else value

    return {key: moved(key, value) for key, value in manifest.items()}


def find_base(manifest: dict[str, Any], adapter: PathLike) -> Path | None:
    """Find the base model named in an adapter's manifest; None if it does not exist.

    Searched: relative to the adapter's folder, relative to the working directory (as in older
    manifests), and by file name beside the adapter. If several exist, one with the right SHA-256 is
    preferred.
    """
    if not manifest.get("base"):
        return None
    named, folder = Path(manifest["base"]), Path(adapter) if os.path.isdir(adapter) else Path(adapter).parent
    found: list[Path] = []
    for path in (folder / named, named, folder / named.name):
        try:
            if os.path.isfile(path) and not any(path.samefile(other) for other in found):
                found.append(path)
        except OSError:  # e.g. the name is too long, or no permission for the folder
            continue
    if len(found) > 1 and (expected := manifest.get("base_sha256")):
        found.sort(key=lambda path: sha256(path) != expected.lower())
    return found[0] if found else None
