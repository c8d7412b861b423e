"""Programs of others that tests run beside the environment (the packages of tests/oracle.txt), and
our script.
"""

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests import forked

ORACLE = Path(sys.prefix) / "oracle"
needs_oracle = pytest.mark.skipif(
    bool(os.environ.get("PY")), reason="make was given a Python of its own, and installs no oracle beside it"
)


# The server has imported our package; the oracle's `rwkv` is another one.
_WITHOUT_OURS = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "rwkv"]:
    del sys.modules[name]
"""


def ask(program: str, *arguments: Any) -> Any:
    """The JSON that a program prints as its last line, in a forked process (tests/forked.py). It
    finds the packages in sys.argv[1], and the arguments, as JSON, in sys.argv[2:].
    """
    assert ORACLE.is_dir(), "the oracle is installed by: make test"
    return run(_WITHOUT_OURS + program, str(ORACLE), *map(json.dumps, arguments))


def run(program: str, *arguments: str) -> Any:
    """The JSON that a program prints as its last line, in a forked process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(program, encoding="utf-8")
        done = forked.Process([path, *arguments], folder, {**os.environ, "HF_HUB_OFFLINE": "1"}).result()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def script_main() -> Any:
    """The main function of scripts/export.py."""
    path = Path(__file__).parents[2] / "scripts/export.py"
    spec = importlib.util.spec_from_file_location("export_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
