"""The .bin files of rwkv.cpp (ggml, file version 101): a header, then tensor after tensor.

    file    int32: magic 0x67676d66, 101, vocabulary size, width, number of blocks, data type
    tensor  int32: number of dimensions, bytes of the name, data type, dimensions from the last to
            the first; name in UTF-8; data

Data types: 0 fp32, 1 fp16. Vectors and small matrices are always fp32. Some tensors are stored as
the program uses them: RWKV-5's decay as exp(−exp(w)), RWKV-4's as −exp(w), low-rank matrices
transposed.
"""

import functools
import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from rwkv.errors import FileFormatError
from rwkv.files import reserve
from rwkv.formats.lazy import Lazy

MAGIC, FILE_VERSION = 0x67676D66, 101
DTYPES = (torch.float32, torch.float16)
_ALWAYS_FP32 = re.compile(r"\.time_|\.(k_k|k_a|r_k|x_rwkvag|x_k|w0|a0|v0)$")
_LOW_RANK = re.compile(r"\.att\.([wavg][12]|time_maa_w1|time_decay_w[12])$")
_MIXED = "rwkvag"  # the order of RWKV-7's mixing weights, which are joined


@dataclass(frozen=True)
class _Decay:
    """How the program stores `time_decay`.

    Attributes:
        store: from BlinkDL's values without dimensions of size 1, and the number of heads.
        restore: the reverse.
    """

    store: Callable[[Tensor, int], Tensor]
    restore: Callable[[Tensor], Tensor]


_DECAYS = {
    "4": _Decay(lambda x, heads: -torch.exp(x), lambda x: torch.log(-x)),
    "5.2": _Decay(
        lambda x, heads: torch.exp(-torch.exp(x)).unsqueeze(-1),
        # a decay that fp32 rounds to 0 would become infinite
        lambda x: torch.log(-torch.log(x.clamp(min=1e-37))).squeeze(-1),
    ),
    "6": _Decay(lambda x, heads: x.reshape(heads, -1, 1), lambda x: x.reshape(1, 1, -1)),
}
"""By version; RWKV-7 has no `time_decay`."""


def convert(tensors: Mapping[str, Lazy], version: str, dtype: torch.dtype) -> dict[str, Lazy]:
    """A model in rwkv.cpp's layout.

    Args:
        version: 4, 5.2, 6 or 7.
        dtype: of matrices: fp32 or fp16.
    """
    found: dict[str, Lazy] = {}
    bonus = tensors.get("blocks.0.att.time_faaaa")  # [H, N]
    heads = bonus.shape[0] if bonus else 1
    for name, tensor in tensors.items():
        if match := re.match(r"(.*\.att\.x_)[rwkvag]$", name):
            joined = [tensors[match[1] + letter] for letter in _MIXED]
            name, tensor = f"{match[1]}rwkvag", Lazy.stack(joined).then(lambda x: x.reshape(6, 1, -1))
        if name in found:
            continue
        tensor = _stored(name, tensor.to(torch.float32), version, heads)
        small = len(tensor.shape) < 2 or _ALWAYS_FP32.search(name)
        found[name] = tensor if small else tensor.cast(dtype, name)
    return found


def _stored(name: str, tensor: Lazy, version: str, heads: int) -> Lazy:
    """A tensor in fp32 as the program stores it."""
    if ".time_" in name:
        tensor = tensor.then(lambda x: x.squeeze())
    if _LOW_RANK.search(name):
        return tensor.then(lambda x: x.t())
    if name.endswith(".time_maa_w2"):
        return tensor.then(lambda x: x.transpose(1, 2))
    if name.endswith(".time_faaaa"):  # [H, N]
        return tensor.then(lambda x: x.unsqueeze(-1))
    if name.endswith(".time_decay"):
        store = _DECAYS[version].store
        return tensor.then(lambda x: store(x, heads))
    return tensor


def restore(tensors: Mapping[str, Lazy], version: str) -> dict[str, Lazy]:
    """The reverse of `convert`; all that is stored differently is computed in fp32."""
    found: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        if name.endswith(".att.x_rwkvag"):
            for i, letter in enumerate(_MIXED):
                found[name.replace("x_rwkvag", f"x_{letter}")] = tensor.then(functools.partial(_row, i))
            continue
        if _LOW_RANK.search(name):
            tensor = tensor.then(lambda x: x.t())
        elif name.endswith(".time_maa_w2"):
            tensor = tensor.then(lambda x: x.transpose(1, 2))
        elif name.endswith(".time_faaaa"):
            tensor = tensor.then(lambda x: x.squeeze(-1))
        elif name.endswith(".time_decay"):
            tensor = tensor.then(_DECAYS[version].restore)
        elif re.search(r"\.time_(mix|maa)_\w$", name):
            tensor = tensor.then(lambda x: x.reshape(1, 1, -1))
        found[name] = tensor
    return found


def _row(number: int, fused: Tensor) -> Tensor:
    return fused[number].reshape(1, 1, -1)


def write(path: Path, tensors: Mapping[str, Lazy], n_layer: int, dtype: torch.dtype) -> None:
    """Write tensors of `convert` into an existing file, one by one.

    Raises:
        OSError: the disk is full.
    """
    vocab_size, width = tensors["emb.weight"].shape
    size = sum(tensor.numel() * tensor.element_size() + len(name) + 64 for name, tensor in tensors.items())
    with open(path, "r+b") as file:
        reserve(file, size)
        file.write(struct.pack("=6i", MAGIC, FILE_VERSION, vocab_size, width, n_layer, DTYPES.index(dtype)))
        for name, lazy in tensors.items():
            encoded, shape = name.encode(), lazy.shape
            file.write(struct.pack("=3i", len(shape), len(encoded), DTYPES.index(lazy.dtype)))
            file.write(struct.pack(f"={len(shape)}i", *reversed(shape)) + encoded)
            file.write(memoryview(lazy.make().contiguous().numpy()).cast("B"))
            lazy.release()
        file.truncate()


def read(path: Path) -> dict[str, Lazy]:
    """The tensors of an unquantised file, mapped. Raises FileFormatError for any other file."""
    with open(path, "rb") as file:
        head = file.read(24)
        if len(head) < 24 or struct.unpack("=2i", head[:8]) != (MAGIC, FILE_VERSION):
            raise FileFormatError("not a file of rwkv.cpp")
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        found: dict[str, Lazy] = {}
        while file.tell() < len(mapped):
            name, shape, number = _entry(file)
            begin, dtype = file.tell(), DTYPES[number]
            size = math.prod(shape) * (2 if number else 4)
            file.seek(begin + size)
            if file.tell() > len(mapped):
                raise FileFormatError(f"truncated: {name} is incomplete")
            if begin % 4:  # misaligned for torch
                make = functools.partial(_copied, path, begin, size, dtype, shape)
            else:
                make = functools.partial(_mapped, mapped[begin : begin + size], dtype, shape)
            found[name] = Lazy(torch.Size(shape), dtype, make)
    return found


def _mapped(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _copied(path: Path, begin: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    with open(path, "rb") as file:
        file.seek(begin)
        return torch.frombuffer(bytearray(file.read(size)), dtype=dtype).reshape(shape)


def _entry(file: BinaryIO) -> tuple[str, tuple[int, ...], int]:
    """The name, shape and data type of the next tensor."""
    try:
        dims, length, dtype = struct.unpack("=3i", file.read(12))
        shape = struct.unpack(f"={dims}i", file.read(4 * dims))
        name = file.read(length).decode()
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise FileFormatError("a tensor's description is corrupt") from error
    if dtype not in (0, 1) or any(n < 1 for n in shape):
        raise FileFormatError(f"{name} is quantised, or corrupt")
    return name, tuple(reversed(shape)), dtype
