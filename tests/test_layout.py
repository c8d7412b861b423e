"""Import contracts, cost of importing, documentation of files and functions."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv.models.version import VERSIONS

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


def versions_in(tree: ast.AST) -> list[ast.Constant]:
    """String constants that name an RWKV version, such as "5.2" or upstream's "x060"."""
    nodes = list(ast.walk(tree))
    formatted = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}  # f"x060{letter}"
    constants = [x for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str) and x not in formatted]
    return [x for x in constants if x.value in VERSIONS or re.fullmatch(r"x0\d\d", x.value)]


def asks_for_version(source: str) -> list[str]:
    """Why a module outside rwkv.models depends on versions by number, other than in one table."""
    found, tables = [], 0
    for node in ast.parse(source).body:
        named = versions_in(node)
        compared = [
            x for part in ast.walk(node) if isinstance(part, ast.Compare | ast.Match) for x in versions_in(part)
        ]
        if named and isinstance(node, ast.Assign | ast.AnnAssign) and not compared:
            tables += 1
        else:
            found += [f"line {x.lineno}: {x.value!r} outside a table" for x in named]
        imports = [x for x in ast.walk(node) if isinstance(x, ast.Import | ast.ImportFrom)]
        if any(re.search(r"rwkv\.models\.v\d|rwkv\.models import .*\bv\d", ast.unparse(x)) for x in imports):
            found.append(f"line {node.lineno}: imports a version's module")
    return found + ([f"{tables} tables by version; join them"] if tables > 1 else [])


def test_versions_are_asked_by_number_only_in_one_table_per_module():
    paths = [path for folder in ("rwkv", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {
        str(path.relative_to(ROOT)): asked
        for path in paths
        if ROOT / "rwkv/models" not in path.parents and (asked := asks_for_version(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('NAMES = {"4": "a", "7": "b"}\ndef f(version): return NAMES[version]', []),
        ('def f(version): return version == "4"', ["line 1: '4' outside a table"]),
        (
            'F = lambda version: version in ("6", "x070")',
            ["line 1: '6' outside a table", "line 1: 'x070' outside a table"],
        ),
        ('def f():\n    return VERSIONS["5.2"]', ["line 2: '5.2' outside a table"]),
        ('A = ("4",)\nB = {"6": 1}', ["2 tables by version; join them"]),
        ("from rwkv.models import parts, v7", ["line 1: imports a version's module"]),
        ("def f(): from rwkv.models.v4 import Sizes", ["line 1: imports a version's module"]),
    ],
)
def test_asking_for_a_version_is_found(source, expected):
    assert asks_for_version(source) == expected
