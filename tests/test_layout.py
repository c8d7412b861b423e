"""The house: imports go down only, data goes right only, importing is free."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / "rwkv").rglob("*.py"))

# Packages and modules from the bottom up; a line imports only from the lines above it.
LAYERS = [
    "rwkv rwkv.commands rwkv.compat rwkv.config rwkv.errors rwkv.legacy_flags rwkv.mapped_tensors rwkv.deepspeed07",
    "rwkv.arguments rwkv.cards rwkv.files",
    "rwkv.cli rwkv.kernels rwkv.plots rwkv.weights",
    "rwkv.adapters.parts rwkv.data rwkv.wkv",
    "rwkv.data.convert rwkv.doctor rwkv.models",
    "rwkv.adapters",
    "rwkv.checkpoint rwkv.generate rwkv.memory rwkv.train",
    "rwkv.export rwkv.terminal rwkv.train.runtime rwkv.train.samples",
    "rwkv.train.budget rwkv.train.console rwkv.train.loop rwkv.train.setup",
    "rwkv.train.report rwkv.train.resume",
    "rwkv.train.callbacks rwkv.train.data_source",
    "rwkv.train.checks rwkv.train.folder",
    "rwkv.train.resume_or_start rwkv.train.stages",
    "rwkv.train.fit",
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms.split()}


def room(module: str) -> str:
    """The longest listed prefix of a module's path."""
    name = module.removesuffix("/__init__").replace("/", ".")
    while name not in LAYER:
        assert "." in name, f"{module} is in no layer"
        name = name.rpartition(".")[0]
    return name


def imports(path: Path) -> set[str]:
    """The rwkv modules that a file imports, anywhere in it, as paths."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.replace(".", "/") for name in names if name.split(".")[0] == "rwkv"}
    return {f"{name}/__init__" if (ROOT / name).is_dir() else name for name in found}


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("module", [str(module) for module in MODULES])
def test_imports_go_down_only(module):
    for imported in imports(ROOT / f"{module}.py"):
        ours, theirs = room(module), room(imported)
        assert ours == theirs or LAYER[theirs] < LAYER[ours], f"{module} imports {imported}, which is not below it"


def test_no_modules_import_each_other_in_a_circle():
    graph = {str(module): imports(ROOT / f"{module}.py") - {str(module)} for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def test_config_imports_nothing_of_rwkv():
    assert imports(ROOT / "rwkv/config.py") == set()


def test_reading_data_knows_nothing_of_how_they_were_converted():
    for path in (ROOT / "rwkv/data").glob("*.py"):
        assert not [x for x in imports(path) if x.startswith("rwkv/data/convert")], path


def test_the_model_does_not_know_lora():
    for path in (ROOT / "rwkv/models").glob("*.py"):
        assert "lora" not in path.read_text(encoding="utf-8").lower(), path


def test_importing_prints_nothing_and_compiles_nothing():
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
