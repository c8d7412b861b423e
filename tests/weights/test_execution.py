"""No module uses a loader that can execute code; every script rejects such files."""

import ast
import re
from pathlib import Path

import hostile
import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("rwkv", "scripts", "bench") for path in (ROOT / folder).rglob("*.py"))
EXECUTING = re.compile(
    r"torch\.(load|jit\..*|hub\..*|package\..*|serialization\.(load|_load|_legacy_load)|fx\..*|_weights_only_unpickler.*|compile)"
    r"|(pickle|dill|cloudpickle|joblib|marshal|shelve)\.(load|loads|open|Unpickler)|(yaml|jsonpickle)\.(full_load|unsafe_load|decode)"
    r"|(pandas|pd)\.read_pickle|runpy\..*|eval|exec|__import__|code\.interact"
)


def calls(path: Path) -> list[ast.Call]:
    """The calls in a source file."""
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_executing_loader_is_called(path):
    for call in calls(path):
        name = ast.unparse(call.func)
        assert not EXECUTING.fullmatch(name), f"{path}:{call.lineno}: {name}"
        if name in ("np.load", "numpy.load"):
            assert not any(
                keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True) for keyword in call.keywords
            )


def imported(path: Path) -> set[str]:
    """The modules that a source file imports, except for pickle's Pickler, which only writes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and [name.name for name in node.names] != ["Pickler"]:
            found.add(node.module or "")
    return found


def test_no_executing_loader_is_imported():
    for path in SOURCES:
        executing = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.jit", "torch.hub"}
        assert not executing & imported(path), path


def test_no_advice_to_use_executing_loader():
    for path in SOURCES:
        if path.name != "pth.py":  # it explains why weights_only is no protection
            assert "weights_only" not in path.read_text(encoding="utf-8"), path


PROGRAMS = {
    "generate": ("generate.py", "--model", "{bad}", "--prompt", "x", "--accelerator", "cpu"),
    "generate, adapter": (
        "generate.py",
        "--model",
        "{base}",
        "--lora",
        "{bad}",
        "--prompt",
        "x",
        "--accelerator",
        "cpu",
    ),
    "merge, adapter": (
        "merge_lora.py",
        "--base",
        "{base}",
        "--adapter",
        "{bad}",
        "--output",
        "o.pth",
        "--lora_alpha",
        "1",
    ),
    "merge, base": ("merge_lora.py", "--base", "{bad}", "--adapter", "{adapter}", "--output", "o.pth"),
    "merge, the base of a manifest": ("merge_lora.py", "--adapter", "{adapter}", "--output", "o.pth"),
    "export": ("export.py", "--model", "{bad}", "--output", "o.pth"),
    "estimate": ("estimate.py", "--load_model", "{bad}"),
    "lora": ("lora.py", "--load_model", "{bad}", "--data_file", "d", "--proj_dir", "r", "--accelerator", "cpu"),
    "finetune": ("finetune.py", "--load_model", "{bad}", "--data_file", "d", "--proj_dir", "r", "--accelerator", "cpu"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_scripts_reject_executable_files(script, make_base, make_data, tmp_path, name):
    make_data(200, name="d")
    base = make_base()
    bad = hostile.scripts(tmp_path)[0]
    adapter = tmp_path / "adapter.pth"
    torch.save(
        {f"blocks.{i}.att.key.lora_{x}": torch.zeros((2, 16) if x == "A" else (16, 2)) for i in (0, 1) for x in "AB"},
        adapter,
    )
    (tmp_path / "adapter.pth.json").write_text(f'{{"alpha": 2, "base": "{bad.name}"}}')
    arguments = [word.format(bad=bad, base=base, adapter=adapter) for word in PROGRAMS[name]]
    result = script(*arguments, status=1)
    assert result.stderr.startswith("error: ")
    assert "TorchScript" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / hostile.MARKER).exists()
    assert "weights_only" not in result.stdout + result.stderr
