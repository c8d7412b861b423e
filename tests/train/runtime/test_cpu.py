"""A process prepared for training keeps its memory, and knows no denormals."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv.config import LoRAConfig, TrainConfig
from rwkv.kernels import load
from rwkv.train.fit import fit
from rwkv.train.runtime import cpu, trainer

FAULTS = """
import resource, torch
from rwkv.train.runtime import cpu
if {prepared}:
    cpu.prepare()
def step():
    for tensor in [torch.empty(3 << 18) for _ in range(6)]:  # 3 MB each, freed together
        tensor.fill_(1)
for _ in range(20):  # until the heap has settled
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, float(torch.tensor(1e-39) * 1))
"""


def faults_and_denormal(prepared: bool) -> tuple[int, float]:
    out = subprocess.run(
        [sys.executable, "-c", FAULTS.format(prepared=prepared)], check=True, capture_output=True, text=True
    ).stdout
    faults, denormal = out.split()
    return int(faults), float(denormal)


HOLES = """
import torch
from rwkv.memory import machine as limits
from rwkv.train.runtime import cpu
early = torch.ones(1 << 20)  # of torch's own allocator, and freed after it was replaced
cpu.prepare()
del early
start = limits.rss()
kept = []
for _ in range(40):  # 3 MB that stay, with 3 MB before and behind that go
    around = [torch.ones(3 << 18) for _ in range(3)]
    kept.append(around[1])
    del around
sizes = [torch.empty(n, dtype=torch.uint8) for n in (1, 63, 64, 65, 4097, 1 << 26)]
assert all(x.data_ptr() % 64 == 0 for x in [*kept, *sizes]) and torch.empty(0).data_ptr() == 0
assert all(float(x.sum()) == 3 << 18 for x in kept)
try:
    torch.empty(1 << 60, dtype=torch.uint8)
except RuntimeError as error:
    assert "can't allocate memory" in str(error)
print((limits.rss() - start) / (40 * (3 << 20)))
"""


@pytest.mark.skipif(load.why_unavailable() is not None, reason="the host extension is not built")
def test_blocks_fit_into_the_holes_that_their_like_left():
    # By torch's own allocator, on glibc before 2.38, 2.1 times what is held.
    out = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True).stdout
    assert float(out) < 1.15


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's; other C libraries keep memory by rules of their own"
)
def test_a_step_takes_the_memory_that_the_step_before_freed():
    # 18 MB in pages of 4 KiB are 4608 faults a step: seen were 0 in twenty steps, and 39,000 in a process not prepared, where glibc's rules, which
    # adapt to what was freed before, mostly give memory back, and sometimes not: so of that process only the denormal is asked.
    faults, denormal = faults_and_denormal(prepared=True)
    assert faults < 500
    assert denormal == 0
    _, denormal = faults_and_denormal(prepared=False)
    assert denormal > 0


HELD = """
import torch
from rwkv.memory import machine as limits
from rwkv.train.runtime import cpu
cpu.prepare()
start, kept = limits.rss(), []
around = []
for _ in range(8):  # 16 MB that go, with a page that stays behind each
    around.append(torch.ones(4 << 20))
    kept.append(torch.ones(1 << 10))
del around
held = limits.rss() - start
cpu.settle()
print(held >> 20, limits.rss() - start >> 20)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="malloc_trim is glibc's; other C libraries keep memory by rules of their own",
)
def test_what_a_prepared_process_keeps_goes_back_when_it_settles():
    out = subprocess.run([sys.executable, "-c", HELD], check=True, capture_output=True, text=True).stdout
    held, left = map(int, out.split())
    assert held > 100
    assert left < 32


def test_a_run_settles_once_after_its_first_step(make_data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "settle", lambda: calls.append(None))
    flags = {
        "ctx_len": 8,
        "micro_bsz": 2,
        "epoch_steps": 3,
        "epoch_count": 1,
        "random_seed": 1,
        "accelerator": "cpu",
        "precision": "fp32",
    }
    fit(
        TrainConfig(
            **flags, n_layer=1, n_embd=8, vocab_size=50, data_file=make_data(200), proj_dir=str(tmp_path / "run")
        )
    )
    assert len(calls) == 1


ZEN_3, ZEN_4, SKYLAKE = (
    "fpu avx avx2 fma",
    "fpu avx2 fma avx512f avx512_bf16",
    "fpu avx2 fma avx512f avx512bw avx512dq avx512vl",
)
SAPPHIRE_RAPIDS = f"{SKYLAKE} avx512_bf16 amx_bf16 amx_tile"
PROCESSORS = [(ZEN_3, "fp32"), (SKYLAKE, "fp32"), (ZEN_4, "bf16"), (SAPPHIRE_RAPIDS, "bf16"), ("fpu amx_bf16", "bf16")]


@pytest.mark.parametrize(("flags", "chosen"), PROCESSORS)
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch, flags, chosen):
    text = f"processor\t: 0\nmodel name\t: avx512_bf16\nflags\t\t: {flags}\nbugs\t\t: amx_bf16\n\nprocessor\t: 1\nflags\t\t: avx512_bf16\n"
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, **how: text if str(path) == "/proc/cpuinfo" else read(path, **how)
    )
    for config in (TrainConfig, LoRAConfig):
        assert trainer.precision_of(config(accelerator="cpu")) == chosen
        assert trainer.precision_of(config(accelerator="cpu", precision="tf32")) == "tf32"


def test_auto_is_fp32_where_the_processor_does_not_say_what_it_can(monkeypatch):
    def refused(*_, **__):
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(Path, "read_text", refused)
    assert cpu.precision() == "fp32"
