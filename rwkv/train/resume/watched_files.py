"""Detect in-place changes of memory-mapped files, which would silently change the results of a
run.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rwkv import mapped_tensors
from rwkv.errors import UserError
from rwkv.files import fingerprint, sha256
from rwkv.train.resume import run_manifest
from rwkv.train.runtime.lightning import rank_zero_only


@dataclass
class _File:
    path: Path
    handle: int  # of the mapped file, even if the path now is another file
    content: Callable[[str], str]
    known: str
    mapped: Callable[[], bool]
    size: int
    time: int


class WatchedFiles:
    """Watches files by size and modification time and, if these changed, by content. Replacing a
    file is allowed, as the old one stays mapped.
    """

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
        """Raise UserError if a file was changed in place since it was given to `watch`."""
        for file in self._files:
            now = os.fstat(file.handle)
            if (now.st_size, now.st_mtime_ns) == (file.size, file.time) or not file.mapped():
                continue
            if file.content(f"/proc/self/fd/{file.handle}") != file.known:
                raise UserError(
                    f"{file.path}: was changed in place during the run, so the steps since the last saved state may be wrong and are not"
                    " saved. Restore its content and run the same command to resume from that state. (To replace a file in use, write"
                    " the new one under another name and rename it.)"
                )
            file.size, file.time = now.st_size, now.st_mtime_ns

    def check_sizes(self) -> None:
        """Raise UserError as `check` does, if a file was truncated. An access to the missing part
        would kill the process (SIGBUS).
        """
        if any(os.fstat(file.handle).st_size < file.size for file in self._files):
            self.check()

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        """If an error occurs in the block and a file was changed, raise the UserError of `check`
        instead. Closes all files.
        """
        try:
            yield
        except (ArithmeticError, LookupError, RuntimeError, ValueError):  # e.g. a token id outside the vocabulary
            self.check()
            raise
        finally:
            while self._files:
                os.close(self._files.pop().handle)


def frozen_in(model: nn.Module, path: str) -> Callable[[], bool]:
    """A function that returns whether frozen weights of the model are still memory-mapped from the
    file.
    """

    def test() -> bool:
        pages = mapped_tensors.Pages(path)
        return any(pages.contains(parameter) for parameter in model.parameters() if not parameter.requires_grad)

    return test


def inputs_of(model: nn.Module, manifest: Mapping[str, Any]) -> WatchedFiles:
    """Watch the files that training reads (on rank 0): base model and data, with their hashes from
    the manifest.
    """
    inputs = WatchedFiles()
    if rank_zero_only.rank == 0:
        if base := manifest["base"]:
            inputs.watch(Path(base["path"]), base["sha256"], sha256, frozen_in(model, base["path"]))
        for data in filter(None, (manifest["data"], manifest["validation"])):
            for path, known in run_manifest.data_files(data):
                inputs.watch(path, known)
    return inputs
