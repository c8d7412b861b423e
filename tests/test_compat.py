"""rwkv/compat.py hides the differences between the stacks from all other modules."""

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl

from rwkv import compat


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])  # fp16 needs a GPU
@pytest.mark.parametrize("single", [True, False])
def test_trainer_options_without_warning(precision, single):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1 if single else 2,
            logger=False,
            enable_checkpointing=False,
            **compat.trainer_options(precision, None if single else "ddp_find_unused_parameters_false"),
        )
    assert ("bf16" in str(trainer.precision)) == (precision == "bf16")
    assert trainer.world_size == (1 if single else 2)


def interrupted(module):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(1)


def test_sigint_handler_restored():
    before = signal.getsignal(signal.SIGINT)
    compat.fit(SimpleNamespace(fit=interrupted), None)  # as Lightning 2 ends on Ctrl-C
    assert signal.getsignal(signal.SIGINT) is before


def test_other_exit_propagates():
    with pytest.raises(SystemExit):
        compat.fit(SimpleNamespace(fit=sys.exit), 3)


def test_cpp_extension_is_silent():
    program = "from rwkv import compat; print(compat.cpp_extension().__name__)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("torch.utils.cpp_extension\n", "")


AMD, INTEL = (
    f"processor : 0\nvendor_id : {vendor}\nflags : fpu fma avx2\n\nprocessor : 1\n"
    for vendor in ("AuthenticAMD", "GenuineIntel")
)


@pytest.mark.parametrize(
    ("cpu", "sets_variable"),
    [(AMD, True), (INTEL, False), (AMD.replace("avx2", "sse2"), False), (None, False)],
    ids=["amd", "intel", "old", "unknown"],
)
def test_mkl_avx2_on_amd(cpu, sets_variable, monkeypatch):
    def text(*_, **__):
        if cpu is None:
            raise FileNotFoundError
        return cpu

    # setenv first: monkeypatch does not restore a variable that was absent when deleted
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "")
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE")
    monkeypatch.setattr(Path, "read_text", text)
    compat.enable_mkl_avx2()
    assert os.environ.get("MKL_DEBUG_CPU_TYPE") == ("5" if sets_variable and compat.stack() == "cu117" else None)
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "4")  # set by the user
    compat.enable_mkl_avx2()
    assert os.environ["MKL_DEBUG_CPU_TYPE"] == "4"


def test_version_checks_only_in_compat(root):
    for path in sorted((root / "rwkv").rglob("*.py")):
        checks = re.findall(
            r"version_info|importlib|ImportError|ModuleNotFoundError|__version__\S* *(?:[<>]|==|!=)",
            path.read_text(encoding="utf-8"),
        )
        # doctor and run_manifest report versions; harness and ray_pool need an optional package;
        # terminal works without readline
        known = ("compat.py", "doctor.py", "harness.py", "ray_pool.py", "run_manifest.py", "terminal.py")
        assert not checks or path.name in known, path
