"""make lists its targets, and finds Python and the environment or reports what is missing."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = "venv env tools image test-image reproduce compose-env lora state dpo finetune pretrain convert inspect merge generate serve evaluate export doctor estimate model demo lm-eval ray test test-gpu bench lint lock pin licenses sbom clean".split()
# Whether make of this checkout created this Python. It would recreate the environment of another
# checkout.
OWN_ENVIRONMENT = (Path(sys.prefix) / ".ready").exists() and ROOT in Path(sys.prefix).resolve().parents
OWN_VARIABLES = {
    "STACK": "cu117" if importlib.metadata.version("torch").startswith("1.") else "modern",
    "VENV": sys.prefix,
}


def make(*arguments, **variables):
    """Run make on the stack of this Python."""
    environment = {name: value for name, value in os.environ.items() if name not in ("ARGS", "PY", "STACK", "VENV")}
    environment |= (
        {"MAKEFLAGS": "", "MAKELEVEL": ""} | (OWN_VARIABLES if OWN_ENVIRONMENT else {"PY": sys.executable}) | variables
    )
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def test_help_lists_targets():
    listed = re.findall(r"^  make ([\w-]+)", make("help").stdout, re.MULTILINE)
    assert set(TARGETS) <= set(listed)
    assert make().stdout == make("help").stdout


def test_readme_targets_exist():
    listed = re.findall(r"^  make ([\w-]+)", make("help").stdout, re.MULTILINE)
    assert set(re.findall(r"`make ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8"))) <= set(listed)


@pytest.mark.skipif(not OWN_ENVIRONMENT, reason="this environment was not created by make")
def test_make_venv_up_to_date():
    result = make("venv")  # pip and uv would print
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_args_reach_script(tmp_path):
    result = make("convert", "ARGS=--input none.jsonl")
    assert result.returncode != 0
    assert "none.jsonl: no such file" in result.stderr
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\nset -f; echo $* >>{tmp_path}/called\n")
    python.chmod(0o755)
    assert make("lora", f"PY={python}", "ARGS=--load_model none.pth --data_file none").returncode == 0
    last = (tmp_path / "called").read_text().splitlines()[-1]
    assert last == "scripts/lora.py --load_model none.pth --data_file none"


@pytest.mark.parametrize("word", ["ARG=--load_model x", "args=--load_model x", "load_model=x.pth", "STAK=modern"])
def test_unknown_variable(word):
    result = make("lora", word)
    assert result.returncode == 2
    assert f"{word.split('=')[0]} is not a variable of this Makefile; pass flags of a job as ARGS=" in result.stderr


def test_model_variable(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\nset -f; echo $* >>{tmp_path}/called\n")
    python.chmod(0o755)
    assert make("model", "MODEL=rwkv7-g1-0.1b", f"PY={python}", ARGS="--newest").returncode == 0
    *_, last = (tmp_path / "called").read_text().splitlines()
    assert last == "scripts/fetch.py --model rwkv7-g1-0.1b --newest"
    assert "MODEL is not a variable" in make("lora", "MODEL=x", f"PY={python}").stderr  # lora would ignore it


def test_environment_variables_on_command_line():
    assert make("help", "CUDA_VISIBLE_DEVICES=1", "OMP_NUM_THREADS=2").returncode == 0


JOBS = {
    name: f"scripts/{name}.py"
    for name in (
        "state",
        "dpo",
        "finetune",
        "pretrain",
        "convert",
        "generate",
        "serve",
        "evaluate",
        "export",
        "doctor",
        "estimate",
    )
}
JOBS |= {
    "lora": "scripts/demo_corpus.py",
    "demo": "scripts/demo_corpus.py",
    "merge": "scripts/merge_lora.py",
    "model": "scripts/fetch.py",
    "inspect": "scripts/inspect_data.py",
    "test": "-m pytest",
    "test-gpu": "-m pytest tests/gpu -m gpu",
}


@pytest.mark.parametrize("target", [*JOBS, "kernels"])
@pytest.mark.parametrize("given", ["on the command line", "in the environment"])
def test_given_python_used(tmp_path, target, given):
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\nset -f; echo $PYTHONPATH $* >>{tmp_path}/called\n")
    python.chmod(0o755)
    variables = {"VENV": str(tmp_path / "venv"), "OUT": str(tmp_path / "out")}
    result = (
        make(target, f"PY={python}", **variables)
        if given == "on the command line"
        else make(target, PY=str(python), **variables)
    )
    assert result.returncode == 0, result.stderr
    first, *rest = (tmp_path / "called").read_text().splitlines()
    assert first.startswith(str(ROOT))  # PYTHONPATH, as this checkout is not installed there
    assert "build.main()" in first
    assert not rest if target == "kernels" else any(JOBS[target] in line for line in rest[:2])
    assert not any("pip" in line for line in rest)
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("given", ["on the command line", "in the environment"])
def test_blanks_and_apostrophes_in_paths(tmp_path, given):
    home, python = tmp_path / "it's a checkout", tmp_path / "a b" / "python"
    for folder in (home, python.parent):
        folder.mkdir()
    shutil.copy(ROOT / "Makefile", home)
    python.write_text(
        f"#!/usr/bin/env bash\necho \"$PYTHONPATH|$RWKV_MAKE|$RWKV_MAKE_FOLDER|$*\" >>'{tmp_path}/called'\n"
    )
    python.chmod(0o755)
    clean = {
        name: value for name, value in os.environ.items() if name not in ("ARGS", "PY", "STACK", "VENV", "PYTHONPATH")
    }
    words, more = ([f"PY={python}"], {}) if given == "on the command line" else ([], {"PY": str(python)})
    command = ["make", "-C", str(home), "doctor", *words]
    subprocess.run(command, capture_output=True, text=True, check=True, env=clean | more)
    escaped = str(python).replace(" ", "\\ ")
    assert (tmp_path / "called").read_text().splitlines()[-1] == f"{home}|make PY={escaped}|{home}|scripts/doctor.py"
    subprocess.run(["bash", "-c", f"make PY={escaped} doctor"], cwd=home, capture_output=True, check=True, env=clean)


@pytest.mark.parametrize(
    ("folder", "expected"), [([], "make PY={} / "), (["-C", str(ROOT)], "make PY={} / " + str(ROOT))]
)
def test_rwkv_make_variable(tmp_path, folder, expected):
    python = tmp_path / "python"
    python.write_text(
        f"#!/usr/bin/env bash\nset -f; echo $PYTHONPATH $RWKV_MAKE / $RWKV_MAKE_FOLDER >>{tmp_path}/called\n"
    )
    python.chmod(0o755)
    assert make(*folder, "merge", f"PY={python}", ARGS="x").returncode == 0
    last = (tmp_path / "called").read_text().splitlines()[-1]
    assert last.startswith(str(ROOT))
    assert last.split(" ", 1)[1].strip() == expected.format(python).strip()


def test_copied_checkout_runs_own_code(tmp_path):
    # the environment's editable install points to the original folder
    for name in ("Makefile", "rwkv", "scripts", "cuda"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / "copy here" / name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
        else:
            (tmp_path / "copy here").mkdir()
            shutil.copy(source, tmp_path / "copy here" / name)
    (tmp_path / "copy here/scripts/doctor.py").write_text("import rwkv; print(rwkv.__file__)")
    result = subprocess.run(
        ["make", "--dry-run", "doctor", f"PY={sys.executable}"],
        cwd=tmp_path / "copy here",
        capture_output=True,
        text=True,
        check=True,
    )
    line = result.stdout.splitlines()[-1]
    result = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path / "copy here", capture_output=True, text=True, check=True
    )
    assert result.stdout == f"{tmp_path}/copy here/rwkv/__init__.py\n"


def test_demo_without_escape_codes(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\necho 1\n")
    python.chmod(0o755)
    result = make("demo", f"PY={python}", OUT=str(tmp_path / "a b"))
    assert "\033" not in result.stdout
    assert f"scripts/demo_corpus.py {tmp_path}/a\\ b/corpus.jsonl" in result.stdout  # quoted for the shell


@pytest.mark.parametrize(
    ("target", "arguments", "printed"),
    [
        ("lora", "", "--version 7 --n_layer 2 --n_embd 128"),
        ("lora", "--version 4", "--version 4 --n_layer 2 --n_embd 96"),
        ("demo", "--version 7", "--version 7 --n_layer 2 --n_embd 128"),
        ("demo", "--help", "demo.sh [--version 4|7]"),
        ("demo", "--version 5.2", "error: --version 5.2: the demo takes only --version 4 or --version 7"),
    ],
)
def test_version_of_demo(tmp_path, target, arguments, printed):
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\necho 1\n")
    python.chmod(0o755)
    result = make(target, f"PY={python}", f"ARGS={arguments}", OUT=str(tmp_path / "out"))
    assert printed in result.stdout + result.stderr
    assert (result.returncode == 0) == ("error" not in printed)


def test_unknown_stack(tmp_path):
    result = make("venv", STACK="cu99", VENV=str(tmp_path / "venv"), PY="")
    assert result.returncode != 0
    assert "STACK=cu99 is not one of cu117, modern" in result.stderr


@pytest.mark.parametrize(("stack", "folder"), [("cu117", ".venv"), ("modern", ".venv-modern")])
def test_environment_per_stack(stack, folder):
    command = ["make", "--dry-run", "--always-make", "venv", f"STACK={stack}"]
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=clean)
    assert result.stdout.startswith(f"env/venv.sh {folder} {stack}\n")


@pytest.fixture
def bare(tmp_path):
    """A PATH with the tools that a script needs, without Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "env", "dirname", "cat", "rm"):
        (folder / tool).symlink_to(
            subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
        )
    return folder


def venv(tmp_path, path, stack, **environment):
    clean = {"PATH": str(path), "HOME": str(tmp_path), **environment}
    return subprocess.run(
        ["env/venv.sh", str(tmp_path / "v"), stack], cwd=ROOT, capture_output=True, text=True, env=clean, check=False
    )


@pytest.mark.parametrize(("stack", "version"), [("cu117", "3.10"), ("modern", "3.12")])
def test_no_python(tmp_path, bare, stack, version):
    result = venv(tmp_path, bare, stack)
    assert result.returncode == 1
    for remedy in (
        "apt install python3.10",
        f"pyenv install {version}",
        "pip install uv",
        "make env",
        "make venv PYTHON=",
    ):
        assert remedy in result.stderr


@pytest.mark.parametrize(("stack", "versions"), [("cu117", "3.10"), ("modern", "3.10 to 3.13")])
def test_wrong_python(tmp_path, bare, stack, versions):
    result = venv(tmp_path, bare, stack, PYTHON="/nowhere/python3")
    assert result.returncode == 1
    assert f"PYTHON=/nowhere/python3 is not a working Python {versions} with" in result.stderr


@pytest.mark.parametrize(("stack", "supported"), [("cu117", [10]), ("modern", [10, 11, 12, 13])])
def test_supported_pythons_per_stack(tmp_path, bare, stack, supported):
    python = tmp_path / "python"
    for minor in range(8, 15):
        python.write_text(
            f'#!/usr/bin/env bash\nexec {sys.executable} -c "import sys; sys.version_info = (3, {minor}, 1); $2" "${{@:3}}"\n'
        )
        python.chmod(0o755)
        result = venv(tmp_path, bare, stack, PYTHON=str(python))
        assert (f"{stack} stack on {python}; installing" in result.stdout) == (minor in supported)
        assert (f"{python} is not a working Python" in result.stderr) == (minor not in supported)


FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in *version_info*) exit 0;; esac
echo "found $0" >&2; exit 7
"""


@pytest.mark.parametrize(
    ("stack", "place"),
    [("cu117", place) for place in ("bin/python3.10", "bin/python3", ".pyenv/versions/3.10.13/bin/python")]
    + [
        ("modern", place)
        for place in ("bin/python3.13", "bin/python3.10", "bin/python3", ".pyenv/versions/3.11.7/bin/python")
    ],
)
def test_python_on_path_and_pyenv(tmp_path, bare, stack, place):
    python = tmp_path / place
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    result = venv(tmp_path, bare, stack)
    assert place.split("/")[-1] in result.stdout
    assert "found " in result.stderr


def test_disk_full_keeps_old_environment(tmp_path, bare):
    (bare / "python3.10").write_text(FAKE_PYTHON)
    (bare / "df").write_text("#!/usr/bin/env bash\necho Filesystem; echo /dev/vda 99999999 0 5242880 97% /\n")
    for tool in ("python3.10", "df"):
        (bare / tool).chmod(0o755)
    for tool in ("du", "cut"):
        (bare / tool).symlink_to(shutil.which(tool))
    (tmp_path / "v").mkdir()
    result = venv(tmp_path, bare, "cu117")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("Not enough disk space: the cu117 stack needs 6 GB ")
    assert result.stderr.endswith(" (3.9 GB afterwards); 5 GB are free.\n")
    assert (tmp_path / "v").is_dir()


@pytest.mark.parametrize(("stack", "version"), [("cu117", "3.10"), ("modern", "3.12")])
def test_python_through_uv(tmp_path, bare, stack, version):
    python = tmp_path / "uv-python"
    python.write_text(FAKE_PYTHON)
    (bare / "uv").write_text(f'#!/usr/bin/env bash\n[ "$*" = "python find --system {version}" ] && echo {python}\n')
    for path in (python, bare / "uv"):
        path.chmod(0o755)
    assert f"found {python}" in venv(tmp_path, bare, stack).stderr
