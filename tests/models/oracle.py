"""Runs independent implementations of RWKV (packages of tests/oracle.txt) in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "oracle"

needs_oracle = pytest.mark.skipif(
    bool(os.environ.get("PY")), reason="make uses an existing Python, and does not install the oracle into it"
)


def ask(program: str, *arguments: object) -> None:
    """Run a program that finds these packages in sys.argv[1], and its arguments after that."""
    assert FOLDER.is_dir(), "the oracle is installed by: make test"
    # -I: the oracle's `rwkv` must not be ours
    command = [sys.executable, "-I", "-c", program, FOLDER, *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
