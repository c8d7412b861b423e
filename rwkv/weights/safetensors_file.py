"""Write safetensors into an existing file, tensor by tensor.

The library's writer creates another file and renames it, which loses our lock, or holds a second
copy of all bytes in memory.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv.files import reserve
from rwkv.formats.lazy import Lazy

_NAMES = {  # in the library's order
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
    torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip


def save(tensors: Mapping[str, Tensor] | Mapping[str, Lazy], path: Path) -> None:
    """Write CPU tensors into an existing file, with the metadata transformers expects, in the
    library's order (widest dtypes first). Lazy tensors are computed one at a time.

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
            lazy = tensors[name]
            tensor = lazy.make() if isinstance(lazy, Lazy) else lazy
            if tensor.numel():
                file.write(memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))
            del tensor
            if isinstance(lazy, Lazy):
                lazy.release()
        file.truncate()
