"""Independent implementations that tests compare with: the packages of tests/oracle.txt, which are
installed beside the environment. They run in separate processes.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(sys.prefix) / "oracle"

needs_oracle = pytest.mark.skipif(
    bool(os.environ.get("PY")), reason="make uses an existing Python, and does not install the oracle beside it"
)


def ask(program: str, *arguments: object, stdin: str = "") -> str:
    """Run a program with the folder of these packages in sys.argv[1], and its arguments after that;
    returns what it prints.
    """
    assert FOLDER.is_dir(), "the oracle is installed by: make test"
    # -I: the oracle's `rwkv` must not be ours
    command = [sys.executable, "-I", "-c", program, FOLDER, *arguments]
    done = subprocess.run([*map(str, command)], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digest(x: torch.Tensor) -> str:
    """The beginning of the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
