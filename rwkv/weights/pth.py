"""Read files of torch.save without executing code from them, on any version of torch.

torch.load before 2.6 passes TorchScript archives to torch.jit.load even with `weights_only=True`
(CVE-2025-32434), so this module has its own parsers. Tensors of uncompressed archives are
memory-mapped copy-on-write: pages are read on access, and writes do not change the file.
"""

import math
import mmap
import os
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rwkv import compat
from rwkv.errors import FileFormatError
from rwkv.files import open_regular
from rwkv.weights.archive import MAGIC, Archive
from rwkv.weights.pickled_names import ITEM_BYTES, DType, StorageSpec, TensorSpec
from rwkv.weights.unpickle import Unpickler

_LEGACY = 0x1950A86A20F9469CFC6C  # the first pickle in a file of torch before 1.6
_USABLE = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_MAX_PICKLE = 1 << 30  # bytes of data.pkl
_MAX_DEPTH = 50  # nesting of dictionaries and lists


def load(path: str | os.PathLike, verify: bool = False) -> Any:
    """Load what torch.save wrote: dicts, lists, tuples, strings, numbers, None, dtypes and CPU
    tensors, mapped if possible.

    Args:
        verify: also verify the checksum of every record, which reads the whole file.

    Raises:
        UserError: it is not a regular file, or cannot be opened.
        FileFormatError: another format, truncated, or it has a tensor that is not dense or has an
            unusual dtype.
    """
    with open_regular(path, "checkpoint") as file:
        head = os.pread(file.fileno(), 4, 0)
        if head == MAGIC:
            return _load_zip(file, verify)
        if head[:1] == b"\x80":
            return _load_legacy(file)
    raise FileFormatError("it is not a file of torch.save")


def _load_zip(file: BinaryIO, verify: bool) -> Any:
    try:
        archive = Archive(file)
    except FileFormatError as error:
        raise _explain_truncation(file, error) from error
    if "byteorder" in archive.records and archive.read("byteorder", 16) != sys.byteorder.encode():
        raise FileFormatError("it was written on a machine with another byte order")
    if verify:
        archive.verify()
    shell = Unpickler(archive.read("data.pkl", _MAX_PICKLE)).load()
    mapped = _map_file(file, archive.size)
    made: dict[str, Any] = {}

    def storage(spec: StorageSpec) -> Any:
        if spec.key not in made:
            name = f"data/{spec.key}"
            record = archive.records.get(name)
            if record is None:
                raise FileFormatError(f"it has no record {name}, but a tensor refers to it")
            if record.deflated:
                _check_size(spec, record.size)
                made[spec.key] = compat.untyped_storage(_byte_tensor(archive.read(name)))
            else:
                made[spec.key] = mapped[record.begin : record.begin + record.size]
        _check_size(spec, made[spec.key].nbytes())
        return made[spec.key]

    return _fill_in(shell, storage)


def _load_legacy(file: BinaryIO) -> Any:
    size = os.fstat(file.fileno()).st_size
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = Unpickler(data)
        if reader.load() != _LEGACY:
            raise FileFormatError("it is a Python pickle, but not one that torch.save wrote")
        if reader.load() != 1001:
            raise FileFormatError("it is a file of torch.save of an unknown version")
        system = reader.load()
        if not isinstance(system, dict) or system.get("little_endian") is not (sys.byteorder == "little"):
            raise FileFormatError("it was written on a machine with another byte order")
        shell = reader.load()
        wanted = {spec.key: spec for spec in reader.storages}
        keys = reader.load()
        if type(keys) is not list or set(map(str, keys)) != wanted.keys() or len(keys) != len(wanted):
            raise FileFormatError("its list of storages disagrees with its tensors")
        at, places = reader.at, {}
        for key in keys:
            spec = wanted[key]
            if data[at : at + 8] != struct.pack("<q", spec.count):
                short = at + 8 > size
                raise FileFormatError(
                    "it is truncated" if short else f"the size of its storage {key} disagrees with its tensors"
                )
            places[key] = at + 8
            at += 8 + spec.nbytes
    if at > size:
        raise FileFormatError(f"it is truncated: it has {size:,} bytes of {at:,}")
    mapped = _map_file(file, size)
    made: dict[str, Any] = {}

    def storage(spec: StorageSpec) -> Any:
        _check_size(spec, wanted[spec.key].nbytes)
        if spec.key not in made:
            made[spec.key] = mapped[places[spec.key] : places[spec.key] + spec.nbytes]
        return made[spec.key]

    return _fill_in(shell, storage)


def _map_file(file: BinaryIO, size: int) -> Any:
    """The bytes of an open file as a storage, mapped copy-on-write; by descriptor, as the path may
    name another file by now.
    """
    return torch.UntypedStorage.from_file(f"/proc/self/fd/{file.fileno()}", False, size)


def _byte_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _check_size(spec: StorageSpec, size: int) -> None:
    if spec.nbytes != size:
        raise FileFormatError(f"its record data/{spec.key} has {size:,} bytes, but its tensors need {spec.nbytes:,}")


def _explain_truncation(file: BinaryIO, error: FileFormatError) -> FileFormatError:
    """If the archive is truncated, an error with the number of bytes its tensors need (data.pkl is
    the first record); else `error`.
    """
    size, header = os.fstat(file.fileno()).st_size, os.pread(file.fileno(), 30, 0)
    if "truncated" not in str(error) or len(header) < 30:
        return error
    name, extra = struct.unpack("<2H", header[26:])
    if not os.pread(file.fileno(), name, 30).endswith(b"/data.pkl"):
        return error
    try:
        reader = Unpickler(os.pread(file.fileno(), min(size, 1 << 26), 0), 30 + name + extra)
        reader.load()
    except FileFormatError:
        return error
    needed = sum(spec.nbytes for spec in {spec.key: spec for spec in reader.storages}.values())
    if size >= needed:
        return error
    return FileFormatError(
        f"it is truncated: it has {size:,} bytes, but its tensors alone need {needed:,}. Download or copy it again"
    )


def _fill_in(shell: Any, storage: Callable[[StorageSpec], Any]) -> Any:
    """The value with each TensorSpec and DType replaced by the tensor or dtype."""
    made: dict[int, Any] = {}

    def fill(value: Any, where: str, depth: int) -> Any:
        kind = type(value)
        if kind is TensorSpec:
            return _tensor(value, where, storage)
        if kind is DType:
            return getattr(torch, value.name, value.name)
        if isinstance(value, dict | list | tuple):
            if id(value) in made:
                return made[id(value)]
            if depth > _MAX_DEPTH:
                raise FileFormatError(f"{where[:100]} is nested more than {_MAX_DEPTH} levels deep")
            inside: Any
            if isinstance(value, dict):
                inside = made[id(value)] = {}
                inside.update(
                    {key: fill(x, f"{where}.{key}" if where else str(key), depth + 1) for key, x in value.items()}
                )
            elif kind is list:
                inside = made[id(value)] = []
                inside.extend([fill(x, f"{where}[{i}]", depth + 1) for i, x in enumerate(value)])
            else:
                inside = made[id(value)] = tuple([fill(x, f"{where}[{i}]", depth + 1) for i, x in enumerate(value)])
            return inside
        if isinstance(value, str | bytes | int | float | None):
            return value
        raise FileFormatError(f"{where[:100]} is neither a tensor nor plain data")

    return fill(shell, "", 0)


def _tensor(spec: TensorSpec, where: str, storage: Callable[[StorageSpec], Any]) -> Tensor:
    where = where[:200] or "its tensor"
    if spec.kind or spec.storage is None:
        raise FileFormatError(f"{where} is {spec.kind}; only dense tensors of numbers can be used")
    if spec.dtype not in _USABLE:
        raise FileFormatError(f"{where} is {spec.dtype}; convert it to float32, bfloat16 or float16")
    elements = math.prod(spec.shape)
    if elements * ITEM_BYTES[spec.dtype] > spec.storage.nbytes:
        raise FileFormatError(
            f"{where} of shape {list(spec.shape)} has {elements:,} elements, but the file has only {spec.storage.nbytes:,} bytes for it (an"
            " expanded tensor); save tensor.contiguous()"
        )
    dtype = getattr(torch, spec.dtype)
    untyped = storage(spec.storage)
    if not elements:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(untyped, spec.offset, spec.shape, spec.stride)
