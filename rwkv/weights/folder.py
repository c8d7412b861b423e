"""Find the files of a model in a transformers folder: one file, or several that an index lists."""

import os
from pathlib import Path

from rwkv.errors import UserError
from rwkv.formats import transformers
from rwkv.weights import recognise
from rwkv.weights.manifest import read_json

FILES = ("model.safetensors", "pytorch_model.bin")


def files_of(path: Path) -> list[Path]:
    """The files with a model's tensors.

    Raises:
        UserError: not a folder with a model; the index or config.json is invalid; a file is
            missing.
    """
    if os.path.isfile(path / "adapter_config.json"):
        raise UserError(f"{path}: {recognise.describe_folder(path)}")
    if os.path.isfile(path / "config.json"):
        transformers.check_config(read_json(path / "config.json"), path / "config.json")
    for name in FILES:
        if os.path.isfile(path / name):
            return [path / name]
        index = path / f"{name}.index.json"
        if os.path.isfile(index):
            return _listed_in(index)
    raise UserError(f"{path}: {recognise.describe_folder(path)}")


def _listed_in(index: Path) -> list[Path]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index}: has no weight_map; download it again")
    names = sorted({str(name) for name in listed.values()})
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise UserError(f"{index}: lists {name[:200]!r}, which is not the name of a file in its folder")
        if not os.path.isfile(index.parent / name):
            raise UserError(
                f"{index.parent}: {name[:200]} is missing, one of {len(names)} files; copy the whole folder"
            )
    return [index.parent / name for name in names]
