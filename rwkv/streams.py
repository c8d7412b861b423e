"""Output streams whose terminal or reader is gone."""

import contextlib
import os


def silence(descriptor: int) -> None:
    """Redirect a file descriptor to /dev/null."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
