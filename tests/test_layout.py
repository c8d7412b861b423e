"""The house: imports go down only, data goes right only, importing is free, the README's tree is true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / "rwkv").rglob("*.py"))

# From the bottom up. A module imports only from rooms below its own, or from its own.
ROOMS = [
    ["rwkv/deepspeed07"],
    ["rwkv/compat", "rwkv/config", "rwkv/legacy_flags", "rwkv/errors", "rwkv/__init__"],
    ["rwkv/arguments", "rwkv/cards", "rwkv/commands"],
    ["rwkv/cli", "rwkv/files", "rwkv/memory/machine", "rwkv/mapped_tensors", "rwkv/unused"],
    ["rwkv/pictures"],
    ["rwkv/weights/__init__", "rwkv/weights/archive", "rwkv/weights/unpickle"],
    [
        "rwkv/weights/pth",
        "rwkv/weights/recognise",
        "rwkv/weights/kinds",
        "rwkv/weights/manifest",
        "rwkv/weights/safetensors_file",
    ],
    ["rwkv/weights/reading", "rwkv/weights/peft_adapter"],
    ["rwkv/kernels/nvrtc", "rwkv/wkv/reference"],
    ["rwkv/kernels/build"],
    ["rwkv/wkv/native"],
    ["rwkv/wkv/__init__"],
    ["rwkv/kernels/elementwise/reference"],
    ["rwkv/kernels/elementwise/eager", "rwkv/kernels/gpu"],
    ["rwkv/kernels/elementwise/native"],
    ["rwkv/kernels/linear"],
    ["rwkv/kernels/head_loss"],
    ["rwkv/models/v4"],
    ["rwkv/model/__init__"],
    ["rwkv/models/init"],
    ["rwkv/adapters/lora"],
    ["rwkv/checkpoint", "rwkv/memory/estimate"],
    ["rwkv/memory/search"],
    ["rwkv/data/__init__"],
    [
        "rwkv/data/convert/jsonl",
        "rwkv/data/convert/roles",
        "rwkv/data/tokenizer",
        "rwkv/data/binidx",
        "rwkv/data/packing",
        "rwkv/data/offsets",
        "rwkv/data/convert/pool",
    ],
    ["rwkv/data/convert/transcode", "rwkv/data/convert/order"],
    ["rwkv/data/convert/formats", "rwkv/data/convert/splits"],
    ["rwkv/data/convert/encodings"],
    ["rwkv/data/convert/sources"],
    [
        "rwkv/data/convert/inputs",
        "rwkv/data/convert/messages",
        "rwkv/data/convert/provenance",
        "rwkv/data/convert/report",
        "rwkv/data/convert/sandbox",
        "rwkv/data/token_stream",
        "rwkv/data/convert/turns",
    ],
    ["rwkv/data/convert/shapes", "rwkv/data/convert/template"],
    ["rwkv/data/convert/detection"],
    [
        "rwkv/data/convert/encode",
        "rwkv/data/convert/shards",
        "rwkv/data/dataset",
        "rwkv/data/histogram",
        "rwkv/data/char_level",
    ],
    ["rwkv/data/batches", "rwkv/data/convert/pipeline", "rwkv/data/inspection"],
    ["rwkv/data/convert/isolated"],
    ["rwkv/doctor", "rwkv/export", "rwkv/generate", "rwkv/train/__init__"],
    ["rwkv/terminal"],
    ["rwkv/train/runtime/lightning"],
    ["rwkv/train/callbacks/curve", "rwkv/train/runtime/process", "rwkv/train/runtime/peers"],
    [f"rwkv/train/{name}" for name in ("cpu", "schedule", "strategy", "plot", "pieces", "adam")],
    [
        *(
            "rwkv/train/budget",
            "rwkv/train/loop/optimizer",
            "rwkv/train/runtime/ranks",
            "rwkv/train/runtime/zero",
            "rwkv/train/runtime/trainer",
        ),
        *("rwkv/train/resume/run_manifest", "rwkv/train/resume/unchanged"),
    ],
    ["rwkv/train/loop/module", "rwkv/train/samples", "rwkv/train/data_source", "rwkv/train/setup"],
    ["rwkv/train/report"],
    [
        "rwkv/train/loop/validation",
        "rwkv/train/callbacks/memory",
        "rwkv/train/checks",
        "rwkv/train/callbacks/signals",
        "rwkv/train/resume/run_state",
    ],
    [
        "rwkv/train/resume/metrics_file",
        "rwkv/train/callbacks/progress",
        "rwkv/train/resume/home",
        "rwkv/train/callbacks/dashboards",
    ],
    ["rwkv/train/resume/state_files"],
    ["rwkv/train/callbacks/nonfinite", "rwkv/train/resume/folder"],
    ["rwkv/train/callbacks/metrics"],
    ["rwkv/train/resume/resume_or_start", "rwkv/train/stages", "rwkv/train/callbacks/checkpointing"],
    ["rwkv/train/fit"],
]
FLOOR = {module: floor for floor, modules in enumerate(ROOMS) for module in modules}
STREAM = [
    "roles",
    "jsonl",
    "transcode",
    "order",
    "formats",
    "splits",
    "encodings",
    "sources",
    "inputs",
    "messages",
    "shapes",
    "sandbox",
    "template",
    "detection",
    "turns",
    "report",
    "tokenizer",
    "binidx",
    "provenance",
    "encode",
    "shards",
    "pool",
    "convert",
    "stream",
    "packing",
    "sampling",
    "dataset",
    "batches",
]


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


def test_every_module_has_a_room():
    assert set(FLOOR) == {str(module) for module in MODULES}


@pytest.mark.parametrize("module", [str(module) for module in MODULES])
def test_imports_go_down_only(module):
    for imported in imports(ROOT / f"{module}.py"):
        same_room = module.endswith("/__init__") and Path(imported).parent == Path(module).parent
        assert FLOOR[imported] < FLOOR[module] or same_room, f"{module} imports {imported}, which is not below it"


def test_config_imports_nothing_of_rwkv():
    assert imports(ROOT / "rwkv/config.py") == set()


def test_data_goes_right_only():
    for position, name in enumerate(STREAM):
        for imported in imports(ROOT / f"rwkv/data/{name}.py"):
            if imported.startswith("rwkv/data/"):
                assert STREAM.index(Path(imported).name) < position
    for name in ("batches", "dataset", "sampling"):  # reading knows nothing of the way the data were made
        assert {Path(x).name for x in imports(ROOT / f"rwkv/data/{name}.py") if "/data/" in x} <= {
            "binidx",
            "dataset",
            "packing",
            "sampling",
            "stream",
            "__init__",
        }


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


def tree() -> dict[str, str]:
    """The README's tree: path to description."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## The tree\n", 1)[1].split("\n## ", 1)[0]
    entries, folder = {}, ""
    for line in block.splitlines():
        if match := re.match(r"    ( *)(\S+)(?: +(.*))?$", line):
            indent, name, description = match.groups()
            folder = folder if indent else ""
            path = folder + name
            if name.endswith("/") and not indent:
                folder = path
            entries[path] = description or ""
    return entries


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "--cached"], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.split()


def test_everything_in_the_readme_tree_exists():
    for path in tree():
        assert (ROOT / path).exists(), path


def test_everything_that_exists_is_in_the_readme_tree():
    entries = tree()
    unlisted = {"LICENSE", "README.md", ".gitignore", ".gitattributes"}
    for path in tracked():
        if path in unlisted or path.endswith("/__init__.py"):
            continue
        covered = path in entries or any(
            entry.endswith("/") and path.startswith(entry) and entries[entry] for entry in entries
        )
        assert covered, f"{path} is not in the README's tree"


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


def test_the_two_readmes_speak_of_the_same_things():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    for pattern in (r"^    (make [^#\n]*?) *(?:#.*)?$", r"`(make \w+)`", r"`(scripts/\w+\.\w+)`", r"\]\(([\w/.]+)\)"):
        ours, theirs = (
            set(re.findall(pattern, text, re.MULTILINE)) - {"README.md", "README.zh.md"} for text in (english, chinese)
        )
        assert ours == theirs, pattern
