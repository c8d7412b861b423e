"""A process prepared for training reuses freed memory and flushes denormals; --precision auto on
CPUs.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from rwkv.config import LoRAConfig, TrainConfig
from rwkv.train.runtime import cpu, trainer

FAULTS = """
import resource, torch
from rwkv.train.runtime import cpu
if {prepared}:
    cpu.prepare()
def step():
    for tensor in [torch.empty(3 << 18) for _ in range(6)]:  # 3 MB each, freed together
        tensor.fill_(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for _ in range(6):  # the heap is stable after the first; the kernel may migrate pages in some of the others
    before = faults()
    for _ in range(20):
        step()
    counts.append(faults() - before)
print(min(counts), float(torch.tensor(1e-39) * 1))
"""


def faults_and_denormal(prepared: bool) -> tuple[int, float]:
    out = subprocess.run(
        [sys.executable, "-c", FAULTS.format(prepared=prepared)], check=True, capture_output=True, text=True
    ).stdout
    faults, denormal = out.split()
    return int(faults), float(denormal)


def test_freed_memory_is_reused():
    # 18 MB in pages of 4 KiB are 4608 faults per step. Measured in 20 steps: 0, and 39,000 in an
    # unprepared process; but as glibc adapts its thresholds, the latter varies, and only its
    # denormals are checked. (NUMA balancing unmaps pages for a while to see who uses them.)
    faults, denormal = faults_and_denormal(prepared=True)
    assert faults < 500
    assert denormal == 0
    _, denormal = faults_and_denormal(prepared=False)
    assert denormal > 0


ZEN_3, ZEN_4, SKYLAKE = (
    "fpu avx avx2 fma",
    "fpu avx2 fma avx512f avx512_bf16",
    "fpu avx2 fma avx512f avx512bw avx512dq avx512vl",
)
SAPPHIRE_RAPIDS = f"{SKYLAKE} avx512_bf16 amx_bf16 amx_tile"
PROCESSORS = [(ZEN_3, "fp32"), (SKYLAKE, "fp32"), (ZEN_4, "bf16"), (SAPPHIRE_RAPIDS, "bf16"), ("fpu amx_bf16", "bf16")]


@pytest.mark.parametrize(("flags", "chosen"), PROCESSORS)
def test_auto_precision_by_cpu_features(monkeypatch, flags, chosen):
    text = f"processor\t: 0\nmodel name\t: avx512_bf16\nflags\t\t: {flags}\nbugs\t\t: amx_bf16\n\nprocessor\t: 1\nflags\t\t: avx512_bf16\n"
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, **how: text if str(path) == "/proc/cpuinfo" else read(path, **how)
    )
    for config in (TrainConfig, LoRAConfig):
        assert trainer.precision_of(config(accelerator="cpu")) == chosen
        assert trainer.precision_of(config(accelerator="cpu", precision="tf32")) == "tf32"


def test_auto_precision_without_cpuinfo(monkeypatch):
    def not_found(*_, **__):
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(Path, "read_text", not_found)
    assert cpu.precision() == "fp32"
