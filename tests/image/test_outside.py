"""The image's behaviour when run, tested on the host: make test-image."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
IMAGE = os.environ["RWKV_TEST_IMAGE"]
FILES = ["compose.yaml", "compose.cpu.yaml", "tests/image/compose.engine.yaml"]
SERVICES = sorted(yaml.safe_load((ROOT / "compose.yaml").read_text())["services"])
USER = os.getuid() or 1000  # runs the jobs
ISOLATED = ("--network", "none", "--read-only", "--tmpfs", "/tmp:exec")


def run(*command, **keywords):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=ROOT, **keywords)


def container(*arguments, options=()):
    return run("docker", "run", "--rm", *ISOLATED, *options, IMAGE, *arguments)


@pytest.fixture
def compose(tmp_path):
    """Run docker compose with models and out below tmp_path; `.out` is the output folder."""
    folders = {name: tmp_path / name for name in ("models", "out")}
    for folder in folders.values():
        folder.mkdir()
        if os.getuid() == 0:
            shutil.chown(folder, USER, USER)
    user = {"UID": str(USER), "GID": str(USER if os.getuid() == 0 else os.getgid())}
    environment = {
        **os.environ,
        **user,
        "STACK": IMAGE.split(":")[1],
        "MODELS": str(folders["models"]),
        "OUT": str(folders["out"]),
    }

    def call(*arguments, files=FILES):
        return run(
            os.environ["COMPOSE"], *[part for name in files for part in ("--file", name)], *arguments, env=environment
        )

    call.out = folders["out"]
    return call


def test_image_labels():
    config = json.loads(run("docker", "image", "inspect", IMAGE).stdout)[0]["Config"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert (
        labels["org.opencontainers.image.version"]
        == re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    )
    assert re.fullmatch("[0-9a-f]{40}|unknown", labels["org.opencontainers.image.revision"])
    assert labels["rwkv.stack"] == IMAGE.split(":")[1]
    assert config["User"] == "1000:1000"
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    assert (environment["NVIDIA_VISIBLE_DEVICES"], environment["NVIDIA_DRIVER_CAPABILITIES"]) == (
        "all",
        "compute,utility",
    )
    assert not [name for name in environment if re.search("proxy|token|secret|index_url", name, re.IGNORECASE)]


def test_no_healthcheck():
    assert "Healthcheck" not in json.loads(run("docker", "image", "inspect", IMAGE).stdout)[0]["Config"]


SMI = "#!/bin/bash\necho '%s'\n"
ERRORS = {
    "no GPU": ((), None, "no GPU is visible"),
    "old driver": ((), "440.33.01, NVIDIA A100, 8.0", "driver is 440.33.01"),
    "GPU without code": ((), "590.1, Tesla K80, 3.7", "3.7, and the "),
    "shm": (("-e", "RWKV_DEVICE=cpu", "--shm-size", "64m"), None, "/dev/shm) has 64 MiB"),
    "not writable": (
        ("-e", "RWKV_DEVICE=cpu", "--shm-size", "2g", "--user", "4321:4321"),
        None,
        "out is not writable by user 4321",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_entrypoint_errors(tmp_path, case):
    options, gpu, what = ERRORS[case]
    if gpu:
        smi = tmp_path / "nvidia-smi"
        smi.write_text(SMI % gpu)
        smi.chmod(0o755)
        options = (*options, "-v", f"{smi}:/usr/bin/nvidia-smi:ro")
    result = container("lora", options=options)
    assert result.returncode == 78, result.stderr
    assert what in result.stderr
    assert "fix: " in result.stderr
    anyway = container(
        "lora", "--load_model", "none.pth", "--data_file", "none", options=(*options, "-e", "RWKV_ANYWAY=1")
    )
    # the script was reached
    assert "none: no such data" in anyway.stderr or "out: cannot be written to" in anyway.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_service_help(compose, service):
    result = compose("run", "--rm", service, "--help")
    assert result.returncode == 0, result.stderr
    assert "usage:" in (result.stdout + result.stderr).lower()


def test_gpu_reservations(compose):
    def reserving(*files):
        services = json.loads(compose("config", "--format", "json", files=files).stdout)["services"]
        return {
            name
            for name, service in services.items()
            if "devices" in service.get("deploy", {}).get("resources", {}).get("reservations", {})
        }

    assert reserving("compose.yaml") == set(SERVICES) - {"model", "convert", "inspect", "estimate", "export"}
    assert reserving(*FILES[:2]) == set()
    if shutil.which("nvidia-container-runtime") is None:
        result = compose("run", "--rm", "doctor", files=["compose.yaml", "tests/image/compose.engine.yaml"])
        assert "could not select device driver" in result.stderr  # quoted in the FAQ
        assert compose("run", "--rm", "doctor", files=FILES).returncode == 0


def test_convert_writes_to_out(compose):
    failed = compose("run", "--rm", "-T", "convert", "--input", "data/example.jsonl")
    assert failed.returncode == 1
    assert "this file system is read-only; write to another folder" in failed.stderr
    result = compose("run", "--rm", "-T", "convert", "--input", "data/example.jsonl", "--output-prefix", "out/example")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in compose.out.iterdir()} == {
        f"example_text_document.{end}" for end in ("bin", "idx", "json")
    }
    assert compose("run", "--rm", "-T", "inspect", "--data_file", "out/example_text_document").returncode == 0


def test_inside():
    result = container(
        "test", "tests/image", "-p", "no:cacheprovider", options=("-e", "RWKV_DEVICE=cpu", "--shm-size", "2g")
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\[100%\]", result.stdout)


def test_demo_without_network(compose):
    started = time.monotonic()
    result = compose("run", "--rm", "lora")
    print(f"the demo in the container: {time.monotonic() - started:.0f} s")
    assert result.returncode == 0, result.stdout + result.stderr
    answer = re.search(r"^after: +What is LoRA\? *(.*)$", result.stdout, re.MULTILINE)[1]
    assert "LoRA" in answer
    assert (compose.out / "demo/tuned.pth").stat().st_size > 10_000_000
    assert {path.stat().st_uid for path in compose.out.rglob("*")} == {USER}
    generated = compose(
        "run",
        "--rm",
        "-T",
        "generate",
        "--model",
        "out/demo/tuned.pth",
        "--ask",
        "What is LoRA?",
        "--temperature",
        "0",
        "--max_tokens",
        "40",
    )
    assert generated.returncode == 0, generated.stderr
    assert " ".join(generated.stdout.split()) == " ".join(answer.split())
