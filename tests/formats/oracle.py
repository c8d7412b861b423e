"""Programs that read our files with other packages (tests/oracle.py), and our script. They are
forked: importing transformers takes long.
"""

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tests import forked
from tests.oracle import FOLDER

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
    assert FOLDER.is_dir(), "the oracle is installed by: make test"
    return run(_WITHOUT_OURS + program, str(FOLDER), *map(json.dumps, arguments))


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
