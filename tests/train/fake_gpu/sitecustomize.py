"""Imported by every Python with this folder in PYTHONPATH: installs the fake GPU (cuda_on_cpu.py)
in the processes that torchrun starts.
"""

import os

if "LOCAL_RANK" in os.environ:
    import cuda_on_cpu

    cuda_on_cpu.install()
