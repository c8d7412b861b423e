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
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_models_do_not_mention_lora():
    for path in (ROOT / "rwkv/models").glob("*.py"):
        assert "lora" not in path.read_text(encoding="utf-8").lower(), path


def test_import_is_silent():
    names = [str(module).replace("/", ".").removesuffix(".__init__") for module in MODULES]
    program = f"""
import importlib, os, subprocess, sys
def refuse(*arguments, **keywords): raise AssertionError(f"import started a process: {{arguments}}")
for name in {names}: importlib.import_module(name) if name != "rwkv.train.fit" else None
subprocess.Popen = os.system = refuse  # Lightning and torch ask for their platform while they are imported; nothing of ours may
for name in [n for n in sys.modules if n.split(".")[0] == "rwkv"]: del sys.modules[name]
for name in {names}: importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "--cached"], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.split()


def test_files_have_one_job_and_nothing_is_large():
    for path in tracked():
        assert (ROOT / path).stat().st_size < 1_000_000, path
    for module in MODULES:
        assert ast.get_docstring(ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))), (
            f"{module} does not say what it is for"
        )


def test_public_functions_are_documented():
    for module in MODULES:
        for node in ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}: {node.name}"
