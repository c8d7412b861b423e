"""Programs of others that tests run beside the environment (the packages of tests/oracle.txt), and
our script.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ORACLE = Path(sys.prefix) / "oracle"
needs_oracle = pytest.mark.skipif(
    bool(os.environ.get("PY")), reason="make was given a Python of its own, and installs no oracle beside it"
)


def ask(program: str, *arguments: Any) -> Any:
    """The JSON that a program prints as its last line. It finds the packages in sys.argv[1], and
    the arguments, as JSON, in sys.argv[2:].
    """
    assert ORACLE.is_dir(), "the oracle is installed by: make test"
    words = [sys.executable, "-W", "ignore", "-I", "-c", program, str(ORACLE), *map(json.dumps, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def script_main() -> Any:
    """The main function of scripts/export.py."""
    path = Path(__file__).parents[2] / "scripts/export.py"
    spec = importlib.util.spec_from_file_location("export_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
