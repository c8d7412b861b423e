"""The image's entry point rejects what cannot run, with an error and a remedy. It runs with stubs
for the system's tools, on any machine.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from rwkv import doctor

ROOT = Path(__file__).parents[1]
A100, H100, P100 = "NVIDIA A100-SXM4-40GB, 8.0", "NVIDIA H100 80GB HBM3, 9.0", "Tesla P100-PCIE-16GB, 6.0"
CUBINS = {"cu117": (60, 70, 75, 80, 86), "modern": (75, 80, 86, 89, 90, 100, 120)}


@pytest.fixture
def entrypoint(tmp_path):
    """Run the entry point in a copy of the image's folder, with simulated GPUs, shared memory and
    permissions.
    """

    def run(*arguments, gpus=(A100,), driver="535.54.03", stack="cu117", shm_mib=8192, writable=True, **environment):
        home = tmp_path / "opt"
        shutil.rmtree(home, ignore_errors=True)
        for folder in ("docker", "scripts", "out", "models", "bin", "rwkv/kernels/lib/torch"):
            (home / folder).mkdir(parents=True)
        shutil.copy(ROOT / "docker/entrypoint.sh", home / "docker")
        shutil.copy(ROOT / "rwkv/drivers.txt", home / "rwkv")
        for arch in CUBINS[stack]:
            (home / f"rwkv/kernels/lib/torch/rwkv_sm_{arch}.cubin").touch()
        (home / "scripts/demo.sh").write_text('#!/bin/bash\necho "demo with $PY"\n')
        (home / "scripts/generate.py").touch()
        (home / "scripts/newer.py").touch()
        stubs = {"python": 'echo "ran $*"', "stat": f"echo '{shm_mib} * 1048576'"}
        if gpus:
            rows = "; ".join(f"echo '{driver}, {gpu}'" for gpu in gpus)
            stubs["nvidia-smi"] = f'[[ "$*" == *driver_version,name,compute_cap* ]] || exit 1\n{rows}'
        if not writable:
            stubs["mktemp"] = "exit 1"  # root could write anywhere
        for name, body in stubs.items():
            (home / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        for path in [*(home / "bin").iterdir(), home / "scripts/demo.sh"]:
            path.chmod(0o755)
        clean = {"PATH": f"{home / 'bin'}:/usr/bin:/bin", "RWKV_STACK": stack, **environment}
        command = ["bash", str(home / "docker/entrypoint.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=clean, check=False)

    if shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("nvidia-smi is installed here, and the tests need a PATH without it")
    return run


def test_supported_gpu_and_driver(entrypoint):
    ada = "NVIDIA GeForce RTX 4090, 8.9"  # runs the code for 8.6
    for gpus, stack, driver in (
        ((A100,), "cu117", "515.43.04"),
        ((ada, P100), "cu117", "535.1"),
        ((H100,), "modern", "580.65.06"),
    ):
        result = entrypoint("lora", "--x", "1", gpus=gpus, stack=stack, driver=driver)
        assert (result.returncode, result.stdout, result.stderr) == (0, "ran scripts/lora.py --x 1\n", "")


def test_server_host_from_environment(entrypoint):
    printed = entrypoint("serve", "--model", "m", RWKV_HOST="0.0.0.0").stdout  # compose.yaml
    assert printed == "ran scripts/serve.py --host 0.0.0.0 --model m\n"


def test_lora_without_flags_runs_demo(entrypoint):
    assert entrypoint("lora").stdout == entrypoint().stdout == "demo with python\n"
    assert entrypoint("lora", "--version", "4").stdout == "demo with python\n"
    assert entrypoint("lora", "--load_model", "a b").stdout == "ran scripts/lora.py --load_model a b\n"


@pytest.mark.parametrize(
    ("job", "command"),
    [
        (["generate", "--ask", "x"], "ran scripts/generate.py --ask x"),
        (["inspect"], "ran scripts/inspect_data.py"),
        (["model", "--list"], "ran scripts/fetch.py --list"),
        (["merge", "--adapter", "a"], "ran scripts/merge_lora.py --adapter a"),
        (["serve", "--model", "a b"], "ran scripts/serve.py --model a b"),
        (["test", "tests/gpu"], "ran -m pytest tests/gpu"),
        (["newer", "--flag"], "ran scripts/newer.py --flag"),
        (["shell", "-c", "echo hello"], "hello"),
        (["echo", "any other command"], "any other command"),
    ],
)
def test_job_dispatch(entrypoint, job, command):
    result = entrypoint(*job)
    assert (result.returncode, result.stdout, result.stderr) == (0, command + "\n", "")


ERRORS = {
    "no GPU": ({"gpus": ()}, "no GPU is visible", ("--gpus all", "RWKV_DEVICE=cpu", "compose.cpu.yaml")),
    "old driver": (
        {"driver": "440.33.01"},
        "driver is 440.33.01, but CUDA 11.7 in this image needs 450",
        ("update the driver", "515"),
    ),
    "old driver, modern": (
        {"gpus": [H100], "stack": "modern", "driver": "535.1"},
        "needs 580",
        ("cu117 stack, which needs 450",),
    ),
    "new GPU": (
        {"gpus": [H100]},
        "H100 80GB HBM3 has compute capability 9.0, and the cu117 stack",
        ("make image STACK=modern",),
    ),
    "second GPU": ({"gpus": [A100, H100]}, "H100 80GB HBM3 has compute capability 9.0", ("STACK=modern",)),
    "old GPU": (
        {"gpus": [P100], "stack": "modern", "driver": "580.1"},
        "6.0, and the modern stack has kernels only for 75",
        ("STACK=cu117",),
    ),
    "older than all supported": ({"gpus": ["Tesla K80, 3.7"]}, "3.7, and the cu117 stack has kernels only for 60", ()),
    "shm": ({"shm_mib": 64}, "/dev/shm) has 64 MiB", ("--ipc=host", "--shm-size")),
    "not writable": ({"writable": False}, f"out is not writable by user {os.getuid()}", ("chown -R", "UID and GID")),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_with_remedy(entrypoint, case):
    options, what, remedies = ERRORS[case]
    result = entrypoint("lora", **options)
    assert (result.returncode, result.stdout) == (78, "")
    first, fix, rest = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert fix.startswith("  fix: ")
    for word in remedies:
        assert word in fix
    assert "RWKV_ANYWAY=1" in rest


@pytest.mark.parametrize(
    ("stack", "driver"),
    [("cu117", driver) for driver in ("449", "450", "470.182.03", "514.9", "515")]
    + [("modern", "579"), ("modern", "580")],
)
def test_driver_rule_matches_doctor(entrypoint, monkeypatch, stack, driver):
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", {"cu117": "11.7", "modern": "13.0"}[stack])
    status = next(doctor._gpus()).status
    result = entrypoint("lora", stack=stack, driver=driver)
    assert (result.returncode, result.stderr.partition(":")[0]) == {
        "ok": (0, ""),
        "warn": (0, "warning"),
        "fail": (78, "error"),
    }[status]


@pytest.mark.parametrize("case", ERRORS)
def test_rwkv_anyway_overrides_errors(entrypoint, case):
    options, what, _ = ERRORS[case]
    result = entrypoint("lora", RWKV_ANYWAY="1", **options)
    assert (result.returncode, result.stdout) == (0, "demo with python\n")
    assert what in result.stderr


def test_jobs_without_gpu(entrypoint):
    for job in (["lora", "--help"], ["inspect"], ["generate", "--accelerator", "cpu"]):
        assert entrypoint(*job, gpus=()).returncode == 0, job
    assert entrypoint("lora", gpus=(), RWKV_DEVICE="cpu").stdout == "demo with python\n"
    assert entrypoint("generate", gpus=()).returncode == 78


def test_jobs_without_output(entrypoint):
    assert entrypoint("generate", writable=False, shm_mib=64).returncode == 0
    assert entrypoint("merge", writable=False).returncode == 78
    assert "models is not writable" in entrypoint("model", writable=False).stderr
