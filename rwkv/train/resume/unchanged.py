"""Detects changes of memory-mapped files: overwriting them in place would silently change the run."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from rwkv import mapped_tensors
from rwkv.errors import UserError
from rwkv.files import fingerprint


@dataclass
class _File:
    path: Path
    handle: int  # of the file that is mapped, whatever has its name since
    content: Callable[[str], str]
    known: str
    mapped: Callable[[], bool]
    size: int
    time: int


class Unchanged:
    """Watches files by size and modification time and, if these changed, by content. A file that was replaced under its name does not count: the old
    one stays mapped."""

    def __init__(self) -> None:
        self._files: list[_File] = []

    def watch(
        self,
        path: Path,
        known: str,
        content: Callable[[str], str] = fingerprint,
        mapped: Callable[[], bool] = lambda: True,
    ) -> None:
        """Watch a file.

        Args:
            known: what `content` returned for the file.
            mapped: whether the run still reads it.
        """
        handle = os.open(path, os.O_RDONLY)
        found = os.fstat(handle)
        self._files.append(_File(path, handle, content, known, mapped, found.st_size, found.st_mtime_ns))

    def check(self) -> None:
        """Raises UserError if a file was changed in place since it was given to `watch`."""
        for file in self._files:
            now = os.fstat(file.handle)
            if (now.st_size, now.st_mtime_ns) == (file.size, file.time) or not file.mapped():
                continue
            if file.content(f"/proc/self/fd/{file.handle}") != file.known:
                raise UserError(
                    f"{file.path}: was changed in place while this run was using it, so the steps since the last saved state may be wrong, and are not"
                    " saved. Put its old content back and run the same command to continue from that state. (To replace a file that is in use, write"
                    " the new one under another name and rename it.)"
                )
            file.size, file.time = now.st_size, now.st_mtime_ns

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """If a file was changed, an error in the block is reported with this cause. Ends the watch."""
        try:
            yield
        except (
            ArithmeticError,
            LookupError,
            RuntimeError,
            ValueError,
        ):  # such as an id that the vocabulary does not have
            self.check()
            raise
        finally:
            while self._files:
                os.close(self._files.pop().handle)


def frozen_in(model: nn.Module, path: str) -> Callable[[], bool]:
    """A function that tells whether frozen weights are still mapped from the file that they were loaded from."""

    def test() -> bool:
        pages = mapped_tensors.Pages(path)
        return any(pages.hold(parameter) for parameter in model.parameters() if not parameter.requires_grad)

    return test
