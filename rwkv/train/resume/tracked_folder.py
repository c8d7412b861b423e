"""The folder of a run, tracked through renames while the run is using it."""

import os
from pathlib import Path

from rwkv.errors import UserError
from rwkv.train.console import say
from rwkv.train.runtime.lightning import rank_zero_only


class TrackedFolder:
    """Context manager that tracks a folder through renames and moves within its file system. Only
    on rank 0, which writes to it.
    """

    def __init__(self, folder: Path):
        self._folder, self._descriptor = folder, -1

    def __enter__(self) -> "TrackedFolder":
        if rank_zero_only.rank == 0:
            self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        return self

    def __exit__(self, *_) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def path(self) -> Path:
        """The current path.

        Raises:
            UserError: it was deleted.
        """
        if self._descriptor < 0:
            return self._folder
        tracked = os.fstat(self._descriptor)
        try:
            current = os.stat(self._folder)
        except OSError:
            current = None
        if current and (current.st_dev, current.st_ino) == (tracked.st_dev, tracked.st_ino):
            return self._folder
        moved = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
        if not tracked.st_nlink or not moved.is_dir():
            raise UserError(
                f"{self._folder} was deleted during the run, with everything saved in it; run again to start over"
            )
        say(f"note: {self._folder} is now {moved}; the run continues there. Pass --proj_dir {moved} to resume it later")
        self._folder = moved
        return moved
