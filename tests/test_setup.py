"""Setup with conda and on Ubuntu: the commands run, with stubs for the tools and os-release.
Neither Ubuntu nor conda is needed.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = "bash env dirname basename cat grep head sed uname ls id".split()


@pytest.fixture
def machine(tmp_path):
    """Run a command on a simulated machine: every given tool is a stub that records its arguments,
    and `release` sets os-release.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(
            subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
        )

    def run(*command, tools=(), release="ubuntu 22.04", **bodies):
        for tool in [*tools, *bodies]:
            (folder / tool).write_text(f'#!/bin/bash\necho "{tool} $*" >>{tmp_path}/called\n{bodies.get(tool, "")}\n')
            (folder / tool).chmod(0o755)
        name, version = release.split()
        (tmp_path / "os-release").write_text(f'ID={name}\nVERSION_ID="{version}"\n')
        environment = {"PATH": str(folder), "HOME": str(tmp_path), "OS_RELEASE": str(tmp_path / "os-release")}
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
        called = tmp_path / "called"
        result.called = called.read_text().splitlines() if called.exists() else []
        called.unlink(missing_ok=True)
        return result

    return run


UPDATE = " env update --name rwkv --file environment.yml"


@pytest.mark.parametrize(
    ("installed", "used", "first", "run"),
    [
        (["conda"], "conda", UPDATE, " run --no-capture-output --name rwkv"),
        (["conda", "mamba"], "mamba", UPDATE, " run --no-capture-output --name rwkv"),
        (["conda", "micromamba"], "micromamba", " create --yes --name rwkv --file environment.yml", " run --name rwkv"),
    ],
)
def test_conda_tool_selection(machine, installed, used, first, run):
    result = machine("env/conda.sh", tools=installed)
    assert result.returncode == 0, result.stderr
    calls = [line for line in result.called if " env list" not in line]
    assert calls[:2] == [used + first, f"{used}{run} env/install.sh python cu117"]
    assert calls[2].startswith(f"{used}{run} python -c from rwkv.kernels import build")
    assert f"{used} activate rwkv" in result.stdout


def test_micromamba_update(machine):
    result = machine("env/conda.sh", micromamba="""[ "$1" != env ] || echo '  "/home/me/micromamba/envs/rwkv"'""")
    assert result.called[1] == "micromamba update --yes --name rwkv --file environment.yml"


def test_make_env_failed_step(machine):
    result = machine("env/conda.sh", conda='[ "$1" != run ]')
    assert result.returncode == 1
    assert len(result.called) == 2
    assert "activate" not in result.stdout


def test_no_conda(machine):
    result = machine("env/conda.sh")
    assert result.returncode == 1
    assert "no mamba, micromamba or conda" in result.stderr
    assert "scripts/ubuntu-setup.sh" in result.stderr


DOCUMENTED = ("haveged", "ninja-build", "python3-pip", "python-is-python3")
NOTHING_INSTALLED = {"dpkg-query": "exit 1", "nvidia-smi": "exit 9"}
ALL_INSTALLED = {"dpkg-query": "echo -n installed", "nvidia-smi": "echo 535.54.03"}


@pytest.mark.parametrize("release", ["ubuntu 20.04", "ubuntu 22.04"])
def test_bare_ubuntu(machine, release):
    result = machine(
        "scripts/ubuntu-setup.sh", "--dry-run", tools=["apt-get", "sudo", "curl"], release=release, **NOTHING_INSTALLED
    )
    assert result.returncode == 0, result.stderr
    install = next(line for line in result.stdout.splitlines() if "apt-get install" in line)
    assert set(DOCUMENTED) <= set(install.split())
    assert ("python3-venv" in install) == (release == "ubuntu 22.04")
    assert "Miniforge3-Linux" in result.stdout


def test_dry_run(machine):
    result = machine(
        "scripts/ubuntu-setup.sh", "--dry-run", tools=["apt-get", "sudo", "curl", "systemctl"], **NOTHING_INSTALLED
    )
    assert {line.split()[0] for line in result.called} <= {"dpkg-query", "nvidia-smi"}


def test_nothing_to_install(machine):
    result = machine("scripts/ubuntu-setup.sh", tools=["apt-get", "sudo", "curl", "mamba"], **ALL_INSTALLED)
    assert result.returncode == 0, result.stderr
    assert {line.split()[0] for line in result.called} == {"dpkg-query", "nvidia-smi"}
    assert "ok: NVIDIA driver 535.54.03" in result.stdout
    assert "ok: mamba" in result.stdout


def test_missing_package_installed(machine):
    has_all_but_haveged = {"dpkg-query": '[[ "$*" == *haveged ]] || echo -n installed', "nvidia-smi": "echo 470.1"}
    result = machine(
        "scripts/ubuntu-setup.sh", "--no-conda", tools=["apt-get"], sudo='exec "$@"', **has_all_but_haveged
    )
    assert result.returncode == 0, result.stderr
    installs = [line for line in result.called if line.startswith("apt-get install")]
    assert installs == ["apt-get install -y haveged"]
    assert "driver is 470.1, but CUDA 11.7 needs 450 or later (515 recommended)" in result.stdout


def test_missing_driver_is_a_hint(machine):
    result = machine(
        "scripts/ubuntu-setup.sh",
        "--no-conda",
        lspci='echo "01:00.0 0302: 10de:20b0"',
        **{**ALL_INSTALLED, "nvidia-smi": "exit 9"},
    )
    assert result.returncode == 0
    assert "NVIDIA GPU but no working driver" in result.stdout


@pytest.mark.parametrize("release", ["ubuntu 18.04", "debian 12", "fedora 40"])
def test_unsupported_system(machine, release):
    result = machine("scripts/ubuntu-setup.sh", tools=["apt-get"], release=release)
    assert result.returncode == 1
    assert release in result.stderr
    assert result.called == []


def test_unknown_option(machine):
    result = machine("scripts/ubuntu-setup.sh", "--dry", tools=["apt-get"])
    assert result.returncode == 2
    assert "--dry is not one of --dry-run" in result.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that compose_env.sh uses."""
    for folder in ("docker", "models", "out"):
        (tmp_path / "c" / folder).mkdir(parents=True)
    (tmp_path / "c/docker/compose_env.sh").write_text((ROOT / "docker/compose_env.sh").read_text())
    return tmp_path / "c"


@pytest.mark.parametrize(("gpu", "files"), [("exit 0", "compose.yaml"), ("exit 9", "compose.yaml:compose.cpu.yaml")])
def test_compose_env(checkout, machine, gpu, files):
    machine("ls", **{"nvidia-smi": gpu})
    environment = {"PATH": f"{checkout.parent / 'bin'}:{os.environ['PATH']}", "HOME": str(checkout)}
    write = ["bash", "docker/compose_env.sh", "modern"]
    result = subprocess.run(write, cwd=checkout, capture_output=True, text=True, env=environment, check=True)
    values = dict(line.split("=", 1) for line in (checkout / ".env").read_text().splitlines())
    uid, gid = (os.getuid(), os.getgid()) if os.getuid() else (1000, 1000)  # jobs never run as root
    assert values == {"COMPOSE_FILE": files, "STACK": "modern", "UID": str(uid), "GID": str(gid)}
    assert (checkout / "out").stat().st_uid == uid
    (checkout / ".env").write_text("MINE=1\n")
    result = subprocess.run(write, cwd=checkout, capture_output=True, text=True, env=environment, check=True)
    assert ".env exists and is unchanged" in result.stdout
    assert (checkout / ".env").read_text() == "MINE=1\n"
