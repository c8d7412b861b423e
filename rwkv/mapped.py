"""Tensors that stay in their file: its pages are read when they are asked for, can be dropped again while nothing is written to them, are shared
with every other process that maps the file, and become this process's own when it writes: the file stays as it is.

So a model costs what is touched of it: of an embedding the rows of the words that occur. What replaces the file under its name (rwkv.files) leaves
its tensors alone; what overwrites or cuts it in place changes them, or ends the process.
"""

import ctypes
import mmap
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv import compat


def load(path: Path) -> Any:
    """torch.load of what is on CPUs, without running code from the file, its tensors left in it where they lie there as in memory: not in a file
    of torch before 1.6, and not compressed. Raises what torch.load does, which may be almost anything."""
    if _lies_as_in_memory(path):
        return compat.load_mapped(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _lies_as_in_memory(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except zipfile.BadZipFile:
        return False
    # torch refuses TorchScript, which has constants.pkl, in words of its own
    return all(x.compress_type == zipfile.ZIP_STORED and not x.filename.endswith("/constants.pkl") for x in records)


class Pages:
    """Where this process has a file mapped; nowhere, where the system does not say."""

    def __init__(self, path: str | os.PathLike):
        name = os.path.realpath(path)
        try:
            lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
        except OSError:
            lines = []
        places = [line.split(maxsplit=5) for line in lines]  # address-address, mode, offset, device, inode, path
        self._ranges = [tuple(int(x, 16) for x in place[0].split("-")) for place in places if place[5:] == [name]]

    def hold(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in them."""
        begin = tensor.data_ptr()
        return any(low <= begin and begin + _bytes(tensor) <= high for low, high in self._ranges)

    def drop(self, tensor: Tensor) -> None:
        """Give back the memory behind a tensor that lies in them, which is contiguous and will not be read soon. What was written to it is lost."""
        self._advise(tensor, mmap.MADV_DONTNEED)

    def scattered(self, tensor: Tensor) -> None:
        """Of a tensor that lies in them rows are read here and there: the system need not read what lies around them."""
        self._advise(tensor, mmap.MADV_RANDOM)

    def _advise(self, tensor: Tensor, advice: int) -> None:
        if tensor.device.type == "cpu" and self.hold(tensor):
            page = mmap.PAGESIZE
            begin = -(-tensor.data_ptr() // page) * page  # whole pages: the others have neighbours
            size = (tensor.data_ptr() + _bytes(tensor)) // page * page - begin
            if size > 0:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
