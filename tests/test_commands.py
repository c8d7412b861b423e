"""Printed commands can be pasted into a shell, however the program was started."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv.commands import command, flags, output, target

ROOT = Path(__file__).parents[1]
NAMES = ["plain", "a b%20c", "模型 数据", "a 'b' \"c\" 模型 $HOME `x` $(y) #1 !2 100%;&|<>*?[a](b){c}\\n~"]


@pytest.fixture(params=["python", "make", "make -C"])
def working_folder(request, monkeypatch):
    """Set the environment as one way of starting a program does; returns the folder in which the
    user pastes the command.
    """
    for name in ("RWKV_MAKE", "RWKV_MAKE_FOLDER", "RWKV_CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    if request.param != "python":
        monkeypatch.setenv("RWKV_MAKE", f"make PY={sys.executable}")
    if request.param == "make -C":
        monkeypatch.setenv("RWKV_MAKE_FOLDER", str(ROOT))
        return Path("/")
    return ROOT


def paste(line: str, folder: Path) -> subprocess.CompletedProcess:
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("ARGS", "PY", "STACK", "VENV", "MAKEFLAGS", "MAKELEVEL")
    }
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=clean | {"PYTHONPATH": str(ROOT)},
    )


def test_printed_command_roundtrip(working_folder, tmp_path, monkeypatch):
    # https://github.com/josStorer/RWKV-Runner/issues/108
    monkeypatch.chdir(ROOT)
    result = paste(command("doctor", "--config", tmp_path / f"{NAMES[-1]}.yaml"), working_folder)
    assert f"error: --config {tmp_path / NAMES[-1]}.yaml: No such file or directory" in result.stderr


def test_model_variable(monkeypatch):
    monkeypatch.delenv("RWKV_MAKE_FOLDER", raising=False)
    monkeypatch.setenv("RWKV_MAKE", "make STACK=modern")
    assert command("model", "--model", "rwkv7-g1-0.4b") == "make STACK=modern model MODEL=rwkv7-g1-0.4b"
    assert command("model", "--model", "a b", "--newest") == "make STACK=modern model MODEL='a b' ARGS=\"--newest\""
    assert command("model", "--list") == 'make STACK=modern model ARGS="--list"'


def test_printed_command_runs(tmp_path, monkeypatch):
    for name in ("RWKV_MAKE", "RWKV_CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{NAMES[1]}.jsonl").write_text('{"text": "hello"}\n')
    result = paste(command("convert", "--output_prefix", f"{NAMES[2]}", "--input", f"{NAMES[1]}.jsonl"), tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / f"{NAMES[2]}_text_document.idx").is_file()


def test_checkout_found_through_pythonpath(tmp_path, monkeypatch):
    """PYTHONPATH may have been set for one command alone: `PYTHONPATH=. python scripts/lora.py`."""
    for name in ("RWKV_MAKE", "RWKV_CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", ".")
    assert command("doctor").startswith("PYTHONPATH=. ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"/elsewhere:{ROOT}")
    assert command("doctor").startswith(f"PYTHONPATH={ROOT} ")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert command("doctor").startswith(shlex.quote(sys.executable))


def test_commands_in_container(monkeypatch):
    monkeypatch.delenv("RWKV_MAKE", raising=False)
    monkeypatch.setenv("RWKV_CONTAINER", "docker compose run --rm")
    assert command("merge", "--adapter", "out/a b.pth") == "docker compose run --rm merge --adapter 'out/a b.pth'"
    assert output("merged.pth") == "out/merged.pth"
    assert output("data/mine") == "out/mine"  # data/ is read-only there
    assert output("out/mine") == "out/mine"
    assert output("models/mine") == "models/mine"
    assert "RWKV_CONTAINER: docker compose run --rm\n" in (ROOT / "compose.yaml").read_text(encoding="utf-8")


def test_flags_quoted_for_shell():
    assert flags("--data_file", "plain") == "--data_file plain"
    assert all(shlex.split(flags("--data_file", name)) == ["--data_file", name] for name in NAMES)


def test_make_target_for_this_python(monkeypatch):
    for name in ("RWKV_MAKE", "RWKV_CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    assert target("kernels") == "make kernels"
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv-modern"))
    assert target("kernels") == "make kernels STACK=modern"
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert target("kernels") == f"make kernels PY={sys.executable}"
    monkeypatch.setenv("RWKV_MAKE", "make STACK=modern")
    assert target("kernels") == "make STACK=modern kernels"
