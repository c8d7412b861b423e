"""Writing safetensors: into a file that is open already, tensor by tensor. The library's own writer makes another file and renames it over ours, which
loses our lock on it, or holds all bytes in memory a second time."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv.files import reserve

_NAMES = {  # in the library's order
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
    torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous tensors on the CPU into an existing file, as transformers reads them: the widest dtypes first, as the library orders them.

    Raises:
        OSError: the disk is full.
    """
    rank = {dtype: place for place, dtype in enumerate(_NAMES)}
    order = sorted(tensors, key=lambda name: (-rank[tensors[name].dtype], name))
    entries, end = {}, 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=False
    ).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "r+b") as file:
        reserve(file, 8 + len(header) + end)
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            if tensors[name].numel():
                file.write(memoryview(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy()))
        file.truncate()
