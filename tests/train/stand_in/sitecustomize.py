"""Imported by every Python with this folder in PYTHONPATH: puts the stand-in for a GPU (cuda_on_cpu.py) into the processes that torchrun starts."""

import os

if "LOCAL_RANK" in os.environ:
    import cuda_on_cpu

    cuda_on_cpu.install()
