"""Change process-wide settings for a block, and restore those that training changes, so that
programs can call `fit` as a function.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import torch

_LOGGERS = ("pytorch_lightning", "lightning_fabric")


def denormals_are_flushed() -> bool:
    """Whether the CPU flushes denormals to zero; torch has no getter for this."""
    return (torch.tensor(1e-310, dtype=torch.float64) * 1).item() == 0


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a block, and for processes that it starts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """On exit, restore environment variables, the number of threads, flushing of denormals, TF32
    settings, warning filters and log levels. Usable as a decorator. The random number generators
    are not restored.
    """
    variables, flushed = dict(os.environ), denormals_are_flushed()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    threads = torch.get_num_threads()  # Lightning 2 changes it with several ranks
    matmul, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = tf32
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        torch.set_flush_denormal(flushed)
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
