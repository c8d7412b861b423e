"""The image's contents, tested in a container: docker compose run --rm test."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv.config import TrainConfig
from rwkv.memory.zero import ZEROS
from rwkv.train.runtime.strategy import deepspeed_config

ROOT = Path(__file__).parents[2]
STACK = os.environ["RWKV_STACK"]
ARCHS = {"cu117": [60, 70, 75, 80, 86], "modern": [75, 80, 86, 89, 90, 100, 120]}[STACK]  # as documented


def test_stack_versions():
    expected = {
        "cu117": {"torch": "1.13.1", "deepspeed": "0.7.0", "pytorch-lightning": "1.9.5"},
        "modern": {"torch": "2.13.0", "deepspeed": "0.19.8", "pytorch-lightning": "2.6.6"},
    }[STACK]
    assert {name: importlib.metadata.version(name).split("+")[0] for name in expected} == expected
    import torch

    assert torch.version.cuda.split(".")[0] == {"cu117": "11", "modern": "13"}[STACK]
    if STACK == "cu117":
        assert sys.version_info[:2] == (3, 10)


def test_packages_match_lock():
    result = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout.strip()) == (0, "No broken requirements found.")
    from rwkv.doctor import run_checks

    assert {finding.name: finding.status for finding in run_checks("out")}["packages"] == "ok"


def test_runs_as_unprivileged_user():
    assert os.getuid() != 0
    assert os.access(ROOT / "out", os.W_OK)
    assert os.access(ROOT / "models", os.W_OK)
    for path in (ROOT, ROOT / "rwkv", ROOT / "scripts", ROOT / "docker/entrypoint.sh", Path(sys.prefix)):
        assert not os.access(path, os.W_OK), path


def test_no_compiler():
    assert [name for name in ("cc", "gcc", "g++", "c++", "clang", "nvcc", "ld", "make") if shutil.which(name)] == []


def test_kernels_for_every_gpu_of_stack():
    import torch

    from rwkv.kernels import build, load

    assert build.why_unavailable() is None  # sources, sizes, files
    assert load.why_unavailable() is None
    manifest = build.manifest()
    assert manifest["torch"] == torch.__version__
    files = manifest["device"]["files"]
    cubins = sorted(int(re.search(r"_sm_(\d+)\.cubin", name).group(1)) for name in files if name.endswith(".cubin"))
    assert set(ARCHS) <= set(cubins)
    assert [name for name in files if name.endswith(".ptx")] == [f"rwkv_compute_{cubins[-1]}.ptx"]
    for name in files:
        content = (build.folder() / name).read_bytes()
        assert content.startswith(b"\x7fELF" if name.endswith(".cubin") else b"//"), name


def test_operator_matches_reference():
    from rwkv.doctor import run_checks

    findings = {finding.name: finding for finding in run_checks("out")}
    assert findings["WKV on the CPU"].status == "ok", findings["WKV on the CPU"]
    assert findings["DeepSpeed"].status == "ok", findings["DeepSpeed"]


def test_doctor_reports_no_failure():
    result = subprocess.run(
        [sys.executable, "scripts/doctor.py", "--folder", "out", "--json", "true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    findings = json.loads(result.stdout)
    assert [finding for finding in findings if finding["status"] == "fail"] == []
    assert result.returncode == 0


@pytest.mark.parametrize("name", sorted(ZEROS))
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_deepspeed_accepts_strategy_config(name, precision):
    """DeepSpeed 0.7.0's configuration breaks on pydantic 2, while the package still imports."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = deepspeed_config(TrainConfig(strategy=name, micro_bsz=4))
    if precision != "fp32":  # as Lightning does
        config[precision] = {"enabled": True}
    read = DeepSpeedConfig(config)
    assert read.zero_optimization_stage == ZEROS[name].stage
    assert bool(read.zero_config.offload_optimizer) == ZEROS[name].offload_optimizer
    assert bool(read.zero_config.offload_param) == ZEROS[name].offload_weights
    assert (read.train_micro_batch_size_per_gpu, read.train_batch_size) == (4, 4)
    with pytest.raises(AssertionError, match=r"train_batch_size|Check batch"):
        DeepSpeedConfig({**config, "train_batch_size": 5})


@pytest.mark.skipif(STACK != "cu117", reason="newer DeepSpeeds have no such extension")
def test_deepspeed_extension_without_compiler():
    """DeepSpeed 0.7.0 compiles an extension when the engine is created. (Training with DeepSpeed:
    tests/train/test_strategies.py.)
    """
    from rwkv import compat

    compat.import_deepspeed(on_gpu=True)
    from deepspeed.ops.op_builder import UtilsBuilder

    assert UtilsBuilder().load().flatten
