"""Read the tensors of a model or adapter from any file format that is supported, under BlinkDL's
names.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rwkv.errors import FileFormatError, UserError, printable
from rwkv.files import open_regular
from rwkv.formats import transformers
from rwkv.weights import folder, kinds, pth, recognise
from rwkv.weights.archive import MAGIC

# Keys under which training programs save a state_dict.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights", "params")
_MAX_HEADER = 100_000_000  # bytes of a safetensors header
_DTYPES = ("F64", "F32", "F16", "BF16")


def tensors_of(path: str | os.PathLike) -> dict[str, Tensor]:
    """The floating-point tensors of a torch.save or safetensors file, or of a transformers folder
    of one or several such files, on the CPU, in their stored dtypes, mapped if possible.

    Nested dictionaries (`state_dict`, `model`, `module`) are unwrapped, and names are converted to
    BlinkDL's (`kinds.upstream_name`, rwkv.formats.transformers).

    Raises:
        UserError: any other file; says what it is and what to do.
    """
    path = Path(path)
    if not os.path.isdir(path):
        return _check_floating_point(_rename(_of_file(path), path), path)
    found: dict[str, Tensor] = {}
    for file in folder.files_of(path):
        tensors = _of_file(file)
        if twice := next(iter(tensors.keys() & found.keys()), None):
            raise UserError(f"{file}: has {twice[:200]}, as another file of {path} has; download the folder again")
        found.update(tensors)
    return _check_floating_point(_rename(found, path), path)


def _of_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, under their names in it."""
    with open_regular(path, "checkpoint") as file:
        head = os.pread(file.fileno(), 9, 0)
        if is_safetensors(file):
            found: Any = _safetensors(path, file)
        elif head.startswith((MAGIC, b"\x80")):
            try:
                found = pth.load(path)
            except FileFormatError as error:
                raise UserError(f"{path}: {recognise.describe_error(error)}") from error
        else:
            raise UserError(f"{path}: {recognise.describe_file(file)}")
    return _unwrap(found, path)


def is_safetensors(file: BinaryIO) -> bool:
    """Whether an open file begins like safetensors: with the size of a header, and the header's
    opening brace.
    """
    head = os.pread(file.fileno(), 9, 0)
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _MAX_HEADER


def _safetensors(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    size, header = os.fstat(file.fileno()).st_size, int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    if 8 + header > size:
        raise UserError(
            f"{path}: truncated: it has {size:,} bytes, but its header alone needs {8 + header:,}. Download or copy it again"
        )
    try:
        entries = json.loads(os.pread(file.fileno(), header, 8))
        stored = {
            name: (entry["dtype"], int(entry["data_offsets"][1]))
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a valid safetensors file: its header is corrupt. Download or copy it again"
        ) from error
    needed = 8 + header + max((end for _, end in stored.values()), default=0)
    if needed > size:
        raise UserError(f"{path}: truncated: it has {size:,} bytes of {needed:,}. Download or copy it again")
    if strange := next((name for name, (dtype, _) in stored.items() if dtype not in _DTYPES), None):
        raise UserError(f"{path}: {_unusable_dtype(strange, str(stored[strange][0]), list(stored))}")
    try:
        return safetensors.torch.load_file(path)  # memory-mapped by the library
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, KeyError, OverflowError) as error:
        raise UserError(
            f"{path}: not a valid safetensors file ({_first_line(error)}). Download or copy it again"
        ) from error


def _unwrap(value: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(4):
        if not isinstance(value, dict):
            break
        if {"format", "tensors", "text"} <= value.keys():
            raise UserError(f"{path}: the training state of a run, not a model; use the run's newest rwkv-N.pth")
        if value.keys() & {"_strategy", "_version", "_rescale_layer"}:
            raise UserError(
                f"{path}: converted for inference by the PyPI package rwkv (its matrices are transposed and rescaled); use the .pth that it was"
                " converted from"
            )
        if value and all(isinstance(x, Tensor) for x in value.values()):
            break
        inside = [key for key in _WRAPPERS if isinstance(value.get(key), dict) and value[key]]
        filled = [key for key in inside if _has_tensors(value[key])]
        if len(filled) > 1:
            raise UserError(
                f"{path}: has tensors under {' and '.join(filled)}; save one of them to a separate file, and use that file"
            )
        if not inside:
            break
        value = value[(filled or inside)[0]]
    if isinstance(value, dict):
        if value.keys() >= {"state", "param_groups"} or value.keys() & {
            "optimizer_state_dict",
            "base_optimizer_state",
            "optimizer",
        }:
            raise UserError(
                f"{path}: an optimizer state, not a model (its keys are {_list_keys(value)}); use the weights of the same run"
            )
        if not value:
            raise UserError(f"{path}: an empty dictionary, not a model; use the model's state_dict")
    if isinstance(value, list) and value and all(isinstance(x, Tensor) for x in value):
        raise UserError(
            f"{path}: a list of {len(value)} tensors, such as an inference state, not a model; use the model's state_dict"
        )
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: contains a {type(value).__name__}, not a dictionary of tensors; use the model's state_dict"
        )
    for name, x in value.items():
        if not isinstance(name, str):
            raise UserError(
                f"{path}: its key {str(name)[:100]} is of type {type(name).__name__}, not the name of a tensor; use the model's state_dict"
            )
        if not isinstance(x, Tensor):
            kind = type(x).__name__
            raise UserError(
                f"{path}: its entry {str(name)[:100]!r} is of type {kind}, not a tensor; use the model's state_dict alone"
            )
    return value


def _has_tensors(value: Any, depth: int = 4) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, dict) and depth > 0 and any(_has_tensors(x, depth - 1) for x in value.values())
    )


def _rename(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    if transformers.is_fla(tensors):
        tensors = transformers.from_fla(tensors)
    for name, tensor in tensors.items():
        ours = kinds.upstream_name(name)
        if ours in renamed:
            raise UserError(f"{path}: has {ours[:200]} twice, once as {name[:200]}; remove one of them")
        renamed[ours] = tensor
    return renamed


def _check_floating_point(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"{path}: {_unusable_dtype(name, str(tensor.dtype).removeprefix('torch.'), list(tensors))}")
    return tensors


def _unusable_dtype(name: str, dtype: str, names: list[str]) -> str:
    few_bits = re.search(r"[A-Za-z][48](?!\d)", dtype)  # int8, F8_E4M3, float4_…, but not int64
    kind = "quantised for inference" if few_bits else "not a checkpoint of a model"
    if any(x.endswith(("_mx", "_rx", "_my", "_ry")) for x in names):
        kind = "quantised to 8 bits for inference (PyPI rwkv's fp16i8)"
    return f"{kind}: {printable(name)[:200]} is {dtype}; use the original, in float32, bfloat16 or float16"


def _list_keys(value: dict) -> str:
    return ", ".join(printable(key)[:50] for key in list(value)[:4])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
