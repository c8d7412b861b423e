"""Only rwkv/train/runtime/lightning.py imports Lightning, and corrects its rank."""

import ast
import importlib

import pytest

from rwkv.errors import UserError
from rwkv.train.runtime import lightning


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_rank_is_a_number(name, monkeypatch):
    """Lightning would raise a ValueError when it is imported."""
    monkeypatch.setenv(name, "first")
    with pytest.raises(UserError, match=f"{name}=first in the environment is not the number of a process"):
        importlib.reload(lightning)


def test_lightning_imported_in_one_module(root):
    importers = set()
    for path in (root / "rwkv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "pytorch_lightning" for name in names):
                importers.add(path.name)
    assert importers == {"lightning.py", "compat.py"}  # compat.py for type annotations only
