"""Tensors memory-mapped from a file, copy-on-write.

Pages are read on access, shared between processes, and can be dropped again if they were not
written to; writes do not change the file. A model therefore takes memory only for what is accessed,
such as the embedding rows of tokens that occur. Atomic replacement of the file (rwkv.files) does
not affect its tensors; overwriting or truncating it in place changes them or kills the process
(SIGBUS; a run checks its files before every batch).
"""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor


class Pages:
    """The address ranges at which this process maps a file, or the files in a folder; none if /proc
    is not available.
    """

    def __init__(self, path: str | os.PathLike):
        names = {os.path.realpath(path)}
        if os.path.isdir(path):
            names = {os.path.realpath(os.path.join(path, name)) for name in os.listdir(path)}
        try:
            lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
        except OSError:
            lines = []
        # address-address, mode, offset, device, inode, path
        places = [line.split(maxsplit=5) for line in lines]
        self._ranges = [
            tuple(int(x, 16) for x in place[0].split("-")) for place in places if place[5:] and place[5] in names
        ]

    def contains(self, tensor: Tensor) -> bool:
        """Whether a tensor is in the mapped file."""
        begin = tensor.data_ptr()
        return any(low <= begin and begin + _bytes(tensor) <= high for low, high in self._ranges)

    def drop(self, tensor: Tensor) -> None:
        """Drop the pages of a mapped contiguous tensor that will not be read soon. Values written
        to it are lost.
        """
        if tensor.device.type == "cpu" and self.contains(tensor):
            page = mmap.PAGESIZE
            # only pages that belong to the tensor alone
            begin = -(-tensor.data_ptr() // page) * page
            _drop(begin, (tensor.data_ptr() + _bytes(tensor)) // page * page)

    def drop_all(self, tensors: Iterable[Tensor]) -> None:
        """Drop all pages between the first and last of these tensors, including pages shared by
        neighbours.
        """
        ours = [(tensor.data_ptr(), tensor.data_ptr() + _bytes(tensor)) for tensor in tensors if self.contains(tensor)]
        if ours:
            begin, end = min(begin for begin, _ in ours), max(end for _, end in ours)
            if any(low <= begin and end <= high for low, high in self._ranges):
                _drop(begin // mmap.PAGESIZE * mmap.PAGESIZE, end)


def _drop(begin: int, end: int) -> None:
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
