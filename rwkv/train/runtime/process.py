"""Process-wide settings that training changes, and their restoration, so that a program can call `fit` as a function."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import torch

_LOGGERS = ("pytorch_lightning", "lightning_fabric")


def denormals_are_flushed() -> bool:
    """Whether arithmetic on CPUs flushes denormal numbers to zero; torch can set this but not read it."""
    return (torch.tensor(1e-310, dtype=torch.float64) * 1).item() == 0


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restores on exit what a training run sets for its process: environment variables, flushing of denormals, TF32 switches, warning filters
    and log levels. Usable as a decorator. Not covered: the random number generators, which the caller seeds by `--random_seed`."""
    environment, flushed = dict(os.environ), denormals_are_flushed()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    matmul, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = tf32
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        torch.set_flush_denormal(flushed)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
