"""Import contracts, cost of importing, documentation of files and functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / "rwkv").rglob("*.py"))


def test_import_contracts_hold():
    """The contracts are in pyproject.toml, under tool.importlinter."""
    pytest.importorskip("importlinter")
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_is_silent():
    names = [str(module).replace("/", ".").removesuffix(".__init__") for module in MODULES]
    program = f"""
import importlib, os, subprocess, sys
def forbid(*arguments, **keywords): raise AssertionError(f"import started a process: {{arguments}}")
for name in {names}: importlib.import_module(name) if name != "rwkv.train.fit" else None
subprocess.Popen = os.system = forbid  # not before: Lightning and torch start processes when imported
for name in [n for n in sys.modules if n.split(".")[0] == "rwkv"]: del sys.modules[name]
for name in {names}: importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def tracked() -> list[str]:
    result = subprocess.run(["git", "ls-files", "--cached"], capture_output=True, text=True, cwd=ROOT, check=True)
    return result.stdout.split()


def test_no_large_files():
    for path in tracked():
        assert (ROOT / path).stat().st_size < 1_000_000, path


def test_modules_have_docstrings():
    for module in MODULES:
        assert ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))), module


def test_public_functions_are_documented():
    for module in MODULES:
        for node in ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}: {node.name}"
