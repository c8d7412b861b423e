"""Waiting for other processes and threads: for a condition, with one limit for all tests."""

import time
from collections.abc import Callable
from typing import Any

LIMIT = 300  # seconds; enough for a loaded machine at a quarter of the speed


def wait_until(condition: Callable[[], Any], process=None) -> Any:
    """Returns the first true value of `condition()`. Fails after LIMIT seconds, or if it is false
    although `process` has ended.
    """
    end = time.monotonic() + LIMIT
    while True:
        ended = process is not None and process.poll() is not None
        if found := condition():
            return found
        assert not ended, f"ended with {process.returncode}: {process.args}"
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.02)
