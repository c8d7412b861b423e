"""make is the index, and finds or asks for what it needs."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = "venv env lora finetune pretrain convert merge generate demo test lint lock clean".split()


def make(*arguments, **keywords):
    environment = {**os.environ, "MAKEFLAGS": "", "MAKELEVEL": ""}
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=environment, **keywords)


def test_help_is_the_index():
    listed = re.findall(r"^  make ([\w-]+)", make("help").stdout, re.MULTILINE)
    assert set(TARGETS) <= set(listed)
    assert make().stdout == make("help").stdout


def test_every_make_target_of_the_readme_exists():
    listed = re.findall(r"^  make ([\w-]+)", make("help").stdout, re.MULTILINE)
    assert set(re.findall(r"`make ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8"))) <= set(listed)


def test_a_second_make_venv_is_quick_and_silent():
    started = time.monotonic()
    done = make("venv")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - started < 2


def test_arguments_reach_the_script():
    done = make("lora", "ARGS=--load_model none.pth --data_file none")
    assert done.returncode != 0
    assert "none.pth: no such checkpoint" in done.stderr


@pytest.fixture
def bare(tmp_path):
    """A PATH with the tools that a script needs and no Python at all."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "env", "dirname", "cat", "rm"):
        (folder / tool).symlink_to(subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip())
    return folder


def venv(tmp_path, path, **environment):
    clean = {"PATH": str(path), "HOME": str(tmp_path), **environment}
    return subprocess.run(["docker/venv.sh", str(tmp_path / "v")], cwd=ROOT, capture_output=True, text=True, env=clean, check=False)


def test_without_python_310_it_says_how_to_get_one(tmp_path, bare):
    done = venv(tmp_path, bare)
    assert done.returncode == 1
    for way in ("apt install python3.10", "pyenv install 3.10", "pip install uv", "make env", "make venv PYTHON="):
        assert way in done.stderr


def test_a_wrong_python_is_refused_by_name(tmp_path, bare):
    done = venv(tmp_path, bare, PYTHON="/nowhere/python3")
    assert done.returncode == 1
    assert "PYTHON=/nowhere/python3 is not a working Python 3.10" in done.stderr


FAKE = """#!/usr/bin/env bash
case "$*" in *version_info*) exit 0;; esac
echo "found $0" >&2; exit 7
"""


@pytest.mark.parametrize("place", ["bin/python3.10", "bin/python3", ".pyenv/versions/3.10.13/bin/python"])
def test_python_310_is_found_on_path_and_under_pyenv(tmp_path, bare, place):
    python = tmp_path / place
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(FAKE)
    python.chmod(0o755)
    done = venv(tmp_path, bare)
    assert place.split("/")[-1] in done.stdout
    assert "found " in done.stderr


def test_python_310_is_found_through_uv(tmp_path, bare):
    python = tmp_path / "uv-python"
    python.write_text(FAKE)
    (bare / "uv").write_text(f'#!/usr/bin/env bash\n[ "$*" = "python find --system 3.10" ] && echo {python}\n')
    for path in (python, bare / "uv"):
        path.chmod(0o755)
    assert f"found {python}" in venv(tmp_path, bare).stderr
