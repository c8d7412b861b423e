"""The container format GGUF (version 3) of llama.cpp: metadata, descriptions of tensors, and their
data.

    file      "GGUF", uint32 version, uint64 number of tensors, uint64 number of metadata entries
    metadata  name, uint32 type, value. Strings are a uint64 length and bytes; arrays are a uint32
              type, a uint64 length and the values
    tensor    name, uint32 number of dimensions, uint64 dimensions from the last to the first,
              uint32 type, uint64 offset of its data
    data      begins at a multiple of 32 bytes in the file; each tensor's offset in it is a multiple
              of 32, too

Q8_0 stores blocks of 32 values of a row: an fp16 scale (the block's largest absolute value / 127)
and 32 8-bit integers (the values divided by the scale, rounded to nearest).
"""

import functools
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv.errors import FileFormatError, UserError
from rwkv.files import reserve
from rwkv.formats.lazy import Lazy

BLOCK = 32  # values in a block of Q8_0
_ALIGNMENT = 32
_NUMBERS = {"F32": 0, "F16": 1, "Q8_0": 8, "BF16": 30}  # ggml's numbers of tensor types
_TYPES = {number: name for name, number in _NUMBERS.items()}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_Q8_0 = np.dtype([("scale", np.float16), ("values", np.int8, BLOCK)])
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 8, 9, 10
_BYTES = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    _UINT32: 4,
    _INT32: 4,
    _FLOAT32: 4,
    7: 1,
    _UINT64: 8,
    11: 8,
    12: 8,
}  # of metadata types
_ROWS = 1 << 20  # elements that are quantised at a time


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Lazy], types: Mapping[str, str]) -> None:
    """Write into an existing file, tensor by tensor.

    Args:
        metadata: strings, integers, floating-point numbers, lists of bytes or of integers.
        types: F32, F16, BF16 or Q8_0 for each tensor; Q8_0 needs rows of a multiple of 32.

    Raises:
        UserError: a value overflows in its type.
        OSError: the disk is full.
    """
    head = [b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    head += [_text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, lazy in tensors.items():
        dims = struct.pack(f"<I{len(lazy.shape)}Q", len(lazy.shape), *reversed(lazy.shape))
        head.append(_text(name) + dims + struct.pack("<IQ", _NUMBERS[types[name]], offset))
        offset += _padded(_size(lazy.shape.numel(), types[name]))
    header = b"".join(head)
    with open(path, "r+b") as file:
        reserve(file, _padded(len(header)) + offset)
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for name, lazy in tensors.items():
            for data in _encode(lazy.make(), types[name], name):
                file.write(data.tobytes())
            file.write(bytes(-file.tell() % _ALIGNMENT))
            lazy.release()
        file.truncate()


def _text(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    """A metadata value with its type."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value[0], bytes):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)


def _size(elements: int, kind: str) -> int:
    """Bytes of a tensor's data."""
    return elements // BLOCK * _Q8_0.itemsize if kind == "Q8_0" else elements * (4 if kind == "F32" else 2)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _encode(tensor: Tensor, kind: str, name: str) -> Iterator[np.ndarray]:
    """The data of a tensor, in parts."""
    flat = tensor.contiguous().view(-1)
    for part in flat.split(_ROWS):  # a multiple of BLOCK
        if kind == "Q8_0":
            data = _quantise(part.float().numpy())
            finite = np.isfinite(data["scale"]).all()
        else:
            converted = part.to(_DTYPES[kind])
            data = converted.view(torch.int16 if kind == "BF16" else converted.dtype).numpy()
            finite = torch.isfinite(converted).all()
        if not finite:
            raise UserError(f"{name} is not finite in {kind}; use --dtype bf16 or fp32")
        yield data


def _quantise(values: np.ndarray) -> np.ndarray:
    blocks = values.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        multiples = blocks * np.where(scale == 0, np.float32(0), 1 / scale)
        data = np.empty(len(blocks), _Q8_0)
        data["scale"] = scale[:, 0]
        # halves are rounded away from zero, as in ggml
        data["values"] = np.trunc(multiples + np.copysign(np.float32(0.5), multiples))
    return data


def read(path: Path) -> dict[str, Lazy]:
    """The tensors of a file. F32, F16 and BF16 are mapped copy-on-write; Q8_0 is decoded to fp32
    when it is computed.

    Raises:
        FileFormatError: not GGUF, corrupt, or with another tensor type.
    """
    with open(path, "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    if bytes(mapped[:4]) != b"GGUF":
        raise FileFormatError("not a GGUF file")
    try:
        return _tensors(_Reader(mapped))
    except (struct.error, KeyError, ValueError, IndexError) as error:
        raise FileFormatError("corrupt, or with tensor types that are not supported") from error


class _Reader:
    """Reads values one after another."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 4

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        (length,) = self.take("<Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode()

    def skip(self, kind: int) -> None:
        """Skip a metadata value."""
        if kind == _STRING:
            (length,) = self.take("<Q")
            self.at += length
        elif kind == _ARRAY:
            inner, length = self.take("<IQ")
            for _ in range(length if inner in (_STRING, _ARRAY) else 0):
                self.skip(inner)
            self.at += length * _BYTES.get(inner, 0)
        else:
            self.at += _BYTES[kind]


def _tensors(reader: _Reader) -> dict[str, Lazy]:
    _, tensors, metadata = reader.take("<IQQ")
    for _ in range(metadata):
        reader.text()
        reader.skip(*reader.take("<I"))
    described = []
    for _ in range(tensors):
        name = reader.text()
        shape = reader.take(f"<{reader.take('<I')[0]}Q")[::-1]
        described.append((name, shape, *reader.take("<IQ")))
    begin, found = _padded(reader.at), {}
    for name, shape, number, offset in described:
        kind, count = _TYPES[number], int(np.prod(shape))
        data = reader.data[begin + offset : begin + offset + _size(count, kind)]
        if kind == "Q8_0":
            found[name] = Lazy(torch.Size(shape), torch.float32, functools.partial(_decode, data, shape))
        else:
            found[name] = Lazy.of(torch.frombuffer(data, dtype=_DTYPES[kind]).reshape(shape))
    return found


def _decode(data: memoryview, shape: tuple[int, ...]) -> Tensor:
    """Q8_0 in fp32."""
    blocks = np.frombuffer(data, _Q8_0)
    return torch.from_numpy(blocks["values"] * blocks["scale"].astype(np.float32)[:, None]).reshape(shape)
