"""Tensors that stay in their file: its pages are read when they are asked for, can be dropped again while nothing is written to them, are shared
with every other process that maps the file, and become this process's own when it writes: the file stays as it is.

So a model costs what is touched of it: of an embedding the rows of the words that occur. What replaces the file under its name (rwkv.files) leaves
its tensors alone; what overwrites or cuts it in place changes them, or ends the process.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor


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
        if tensor.device.type == "cpu" and self.hold(tensor):
            page = mmap.PAGESIZE
            begin = -(-tensor.data_ptr() // page) * page  # whole pages: the others have neighbours
            _drop(begin, (tensor.data_ptr() + _bytes(tensor)) // page * page)

    def drop_all(self, tensors: Iterable[Tensor]) -> None:
        """As `drop`, for all that one mapping of the file holds between the first and the last of these tensors, the pages that they share as well."""
        ours = [(tensor.data_ptr(), tensor.data_ptr() + _bytes(tensor)) for tensor in tensors if self.hold(tensor)]
        if ours:
            begin, end = min(begin for begin, _ in ours), max(end for _, end in ours)
            if any(low <= begin and end <= high for low, high in self._ranges):
                _drop(begin // mmap.PAGESIZE * mmap.PAGESIZE, end)


def _drop(begin: int, end: int) -> None:
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
