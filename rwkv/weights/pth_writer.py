"""Write a torch.save file of a dictionary of tensors, tensor by tensor.

torch.save itself needs all tensors in memory. The file is the same: a zip archive of a pickle,
which names the storages, and one record per storage.
"""

import io
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from pickle import Pickler
from typing import Any

import torch
from torch import Tensor

from rwkv import compat
from rwkv.files import reserve
from rwkv.formats.lazy import Lazy

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_OVERHEAD = 512  # bytes of a record beside its data, at most: headers, name and alignment


class _Storage:
    """The storage of one tensor."""

    def __init__(self, key: str, like: Lazy):
        self.id = ("storage", _STORAGES[like.dtype], key, "cpu", like.numel())


class _Stored:
    """A tensor that is pickled as torch.save pickles it."""

    def __init__(self, key: str, like: Lazy):
        self.storage, self.shape = _Storage(key, like), tuple(like.shape)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        strides = torch.empty(self.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _Pickler(Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, _Storage) else None


def save(tensors: Mapping[str, Lazy], path: Path) -> None:
    """Write tensors into an existing file, which torch.load reads as a dictionary.

    Raises:
        OSError: the disk is full.
    """
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(
        {name: _Stored(str(i), tensor) for i, (name, tensor) in enumerate(tensors.items())}
    )
    size = sum(tensor.numel() * tensor.element_size() + _OVERHEAD for tensor in tensors.values())
    with open(path, "r+b") as file:
        reserve(file, size + len(pickled.getvalue()) + (1 << 16))  # torch 1.13.1 crashes if the disk is full
        writer = torch._C.PyTorchFileWriter(file)
        try:
            writer.write_record("data.pkl", pickled.getvalue(), len(pickled.getvalue()))
            writer.write_record("byteorder", b"little", 6)
            for i, lazy in enumerate(tensors.values()):
                _write(writer, f"data/{i}", lazy.make())
                lazy.release()
        finally:  # a writer that is not ended aborts the process when it is destroyed after the file was closed
            writer.write_end_of_file()
        file.truncate()


def _write(writer: Any, name: str, tensor: Tensor) -> None:
    storage, size = compat.untyped_storage(tensor), tensor.numel() * tensor.element_size()
    if not tensor.is_contiguous() or tensor.data_ptr() != storage.data_ptr():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        storage = compat.untyped_storage(tensor)
    writer.write_record(name, compat.record(storage), size)
