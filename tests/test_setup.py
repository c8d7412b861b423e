"""Setup with conda and on Ubuntu: the commands run, with stubs for the tools and os-release.
Neither Ubuntu nor conda is needed.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENOUGH = "bash env dirname basename cat grep head sed uname ls id".split()


@pytest.fixture
def machine(tmp_path):
    """Run a command on a simulated machine: every given tool is a stub that records its arguments,
    and `release` sets os-release.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ENOUGH:
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
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
        called = tmp_path / "called"
        done.called = called.read_text().splitlines() if called.exists() else []
        called.unlink(missing_ok=True)
        return done

    return run


UPDATE = " env update --name rwkv --file environment.yml"


@pytest.mark.parametrize(
    ("there", "used", "first", "run"),
    [
        (["conda"], "conda", UPDATE, " run --no-capture-output --name rwkv"),
        (["conda", "mamba"], "mamba", UPDATE, " run --no-capture-output --name rwkv"),
        (["conda", "micromamba"], "micromamba", " create --yes --name rwkv --file environment.yml", " run --name rwkv"),
    ],
)
def test_conda_tool_selection(machine, there, used, first, run):
    done = machine("env/conda.sh", tools=there)
    assert done.returncode == 0, done.stderr
    made = [line for line in done.called if " env list" not in line]
    assert made[:2] == [used + first, f"{used}{run} env/install.sh python cu117"]
    assert made[2].startswith(f"{used}{run} python -c from rwkv.kernels import build")
    assert f"{used} activate rwkv" in done.stdout


def test_micromamba_update(machine):
    done = machine("env/conda.sh", micromamba="""[ "$1" != env ] || echo '  "/home/me/micromamba/envs/rwkv"'""")
    assert done.called[1] == "micromamba update --yes --name rwkv --file environment.yml"


def test_make_env_failed_step(machine):
    done = machine("env/conda.sh", conda='[ "$1" != run ]')
    assert done.returncode == 1
    assert len(done.called) == 2
    assert "activate" not in done.stdout


def test_no_conda(machine):
    done = machine("env/conda.sh")
    assert done.returncode == 1
    assert "no mamba, micromamba or conda" in done.stderr
    assert "scripts/ubuntu-setup.sh" in done.stderr


DOCUMENTED = ("haveged", "ninja-build", "python3-pip", "python-is-python3")
NOTHING = {"dpkg-query": "exit 1", "nvidia-smi": "exit 9"}
ALL = {"dpkg-query": "echo -n installed", "nvidia-smi": "echo 535.54.03"}


@pytest.mark.parametrize("release", ["ubuntu 20.04", "ubuntu 22.04"])
def test_bare_ubuntu(machine, release):
    done = machine(
        "scripts/ubuntu-setup.sh", "--dry-run", tools=["apt-get", "sudo", "curl"], release=release, **NOTHING
    )
    assert done.returncode == 0, done.stderr
    install = next(line for line in done.stdout.splitlines() if "apt-get install" in line)
    assert set(DOCUMENTED) <= set(install.split())
    assert ("python3-venv" in install) == (release == "ubuntu 22.04")
    assert "Miniforge3-Linux" in done.stdout


def test_dry_run(machine):
    done = machine("scripts/ubuntu-setup.sh", "--dry-run", tools=["apt-get", "sudo", "curl", "systemctl"], **NOTHING)
    assert {line.split()[0] for line in done.called} <= {"dpkg-query", "nvidia-smi"}


def test_nothing_to_install(machine):
    done = machine("scripts/ubuntu-setup.sh", tools=["apt-get", "sudo", "curl", "mamba"], **ALL)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.called} == {"dpkg-query", "nvidia-smi"}
    assert "ok: NVIDIA driver 535.54.03" in done.stdout
    assert "ok: mamba" in done.stdout


def test_missing_package_installed(machine):
    has_all_but_haveged = {"dpkg-query": '[[ "$*" == *haveged ]] || echo -n installed', "nvidia-smi": "echo 470.1"}
    done = machine("scripts/ubuntu-setup.sh", "--no-conda", tools=["apt-get"], sudo='exec "$@"', **has_all_but_haveged)
    assert done.returncode == 0, done.stderr
    installs = [line for line in done.called if line.startswith("apt-get install")]
    assert installs == ["apt-get install -y haveged"]
    assert "driver is 470.1, but CUDA 11.7 needs 450 or later (515 recommended)" in done.stdout


def test_missing_driver_is_a_hint(machine):
    done = machine(
        "scripts/ubuntu-setup.sh",
        "--no-conda",
        lspci='echo "01:00.0 0302: 10de:20b0"',
        **{**ALL, "nvidia-smi": "exit 9"},
    )
    assert done.returncode == 0
    assert "NVIDIA GPU but no working driver" in done.stdout


@pytest.mark.parametrize("release", ["ubuntu 18.04", "debian 12", "fedora 40"])
def test_unsupported_system(machine, release):
    done = machine("scripts/ubuntu-setup.sh", tools=["apt-get"], release=release)
    assert done.returncode == 1
    assert release in done.stderr
    assert done.called == []


def test_unknown_option(machine):
    done = machine("scripts/ubuntu-setup.sh", "--dry", tools=["apt-get"])
    assert done.returncode == 2
    assert "--dry is not one of --dry-run" in done.stderr


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
    done = subprocess.run(write, cwd=checkout, capture_output=True, text=True, env=environment, check=True)
    values = dict(line.split("=", 1) for line in (checkout / ".env").read_text().splitlines())
    uid, gid = (os.getuid(), os.getgid()) if os.getuid() else (1000, 1000)  # jobs never run as root
    assert values == {"COMPOSE_FILE": files, "STACK": "modern", "UID": str(uid), "GID": str(gid)}
    assert (checkout / "out").stat().st_uid == uid
    (checkout / ".env").write_text("MINE=1\n")
    done = subprocess.run(write, cwd=checkout, capture_output=True, text=True, env=environment, check=True)
    assert ".env exists and is unchanged" in done.stdout
    assert (checkout / ".env").read_text() == "MINE=1\n"
