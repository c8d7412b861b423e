"""NVRTC compiles the CUDA kernels without the CUDA toolkit and within their limits of registers."""

import locale
import os
import re
import subprocess

import pytest
import torch

from rwkv import compat
from rwkv.kernels import build, nvrtc

COMPILER = nvrtc.Compiler(compat.nvrtc())
KERNELS = {
    f"wkv4_{what}_{dtype}"
    for what in ("summary", "output", "summary_gradient", "gradient")
    for dtype in ("fp32", "bf16", "fp16")
}
KERNELS |= {"wkv4_scan", "wkv4_scan_gradient"}
KERNELS |= {
    f"wkv6_{what}_{kind}" for what in ("summary", "output", "gradient") for kind in ("fp32", "bf16", "fp16", "wide")
}
KERNELS |= {"wkv6_scan"}
KERNELS |= {
    f"wkv7_{what}_{kind}"
    for what, kinds in {
        "output": ("fp32", "bf16", "fp16", "128", "256"),
        "gradient": ("fp32", "bf16", "fp16", "128", "256"),
    }.items()
    for kind in kinds
}
TENSOR_CORES = {f"wkv7_chunk_{what}" for what in ("prepare", "scan", "output", "scan_gradient", "gradient")}
DTYPES = ("fp32", "bf16", "fp16", "any")
STREAMS = ("fp32", "bf16", "fp16", "fp32_bf16", "fp32_fp16", "any")  # dtypes of residual stream and computation
KERNELS |= {
    f"fused_{what}_{dtype}"
    for what in ("gate", "gate_gradient", "mix", "mix_gradient", "relu2", "relu2_gradient", "dropout", "loss")
    for dtype in DTYPES
}
KERNELS |= {f"fused_{what}_{dtype}" for what in ("shift", "shift_gradient") for dtype in DTYPES}
KERNELS |= {f"fused_{what}_{dtype}" for what in ("norm", "norm_gradient", "norm_sums") for dtype in STREAMS}
KERNELS |= {
    f"fused_{what}_{dtype}"
    for what in ("keys", "keys_gradient", "head_gate", "head_gate_gradient")
    for dtype in ("fp32", "bf16", "fp16")
}
KERNELS |= {f"quant_{what}_{dtype}" for what in ("nf4", "int8") for dtype in ("fp32", "bf16", "fp16")}
KERNELS |= {f"adamw_{what}_{dtype}" for what in ("8bit", "full") for dtype in ("fp32", "bf16")}


# The most registers of a thread, by the beginning of a kernel's name; the first that fits applies.
REGISTERS = {
    # a state and the next chunk; two blocks of 128 threads on a multiprocessor, three of gradients
    "wkv7_chunk_scan": 240,
    "wkv7_chunk_gradient": 168,
    # 16 tokens and their states, or the state of a head and its gradient: the maximum
    **dict.fromkeys(("wkv4_gradient", "wkv6_gradient", "wkv7_gradient", "wkv7_output_128", "wkv7_output_256"), 255),
    # a row in a block of up to 1024 threads
    **dict.fromkeys(("fused_norm_fp", "fused_norm_bf", "fused_norm_any", "fused_norm_gradient", "fused_loss"), 64),
    # elementwise, for full occupancy
    **dict.fromkeys(("fused_gate", "fused_relu2", "fused_dropout", "quant_"), 48),
    "": 128,
}


def kernels_of(arch: int) -> set[str]:
    return KERNELS | TENSOR_CORES if arch >= 80 else KERNELS


ARCHS = build.all_archs()
BUILT = list(build.manifest()["device"].get("files", ()))  # for this machine's GPUs, or for all
# Compiling takes 30 s per architecture: all with RWKV_KERNELS_ALL=1, as in GitHub's CI, otherwise
# the oldest, the newest, and those of this machine.
COMPILED = [
    arch
    for arch in ARCHS
    if os.environ.get("RWKV_KERNELS_ALL") == "1" or arch in (ARCHS[0], ARCHS[-1]) or f"rwkv_sm_{arch}.cubin" in BUILT
]


def test_compiler_matches_torch_cuda():
    assert COMPILER.version.split(".")[0] == torch.version.cuda.split(".")[0]


def test_architectures_of_stack():
    if COMPILER.version == "11.7":
        assert ARCHS == [60, 70, 75, 80, 86]
    else:
        assert [arch for arch in COMPILER.archs if arch >= 75] == ARCHS
        assert {75, 80, 86, 90, 100, 120} <= set(ARCHS)


@pytest.mark.parametrize("arch", COMPILED)
def test_compiles_within_register_budget(arch, tmp_path):
    cubin, log = COMPILER.compile(*build.device_sources(), f"sm_{arch}", build.DEVICE_OPTIONS)
    assert "warning" not in log
    assert "error" not in log
    resources = nvrtc.resources(log)
    assert set(resources) == kernels_of(arch)
    for name, use in resources.items():
        limit = next(limit for beginning, limit in REGISTERS.items() if name.startswith(beginning))
        assert use["registers"] <= limit, name
        # local memory: register spills only (72 bytes in wkv4_gradient on sm_120; more for the head
        # sizes of RWKV-7 that no published model has), independent of T
        larger = {"wkv7_gradient_128": 160, "wkv7_gradient_256": 800, "fused_shift_gradient_fp32": 96}
        spills = larger.get(name, 80)
        assert max(use["stack"], use["spill_stores"], use["spill_loads"]) <= spills, name
    # static shared memory has at most 48 KiB
    shared = dict(
        re.findall(r"entry function '(wkv7_chunk_\w+)'(?:(?!entry function).)*?(\d+) bytes smem", log, re.DOTALL)
    )
    assert all(int(size) <= 48 << 10 for size in shared.values()), shared
    name = f"rwkv_sm_{arch}.cubin"
    assert name not in BUILT or resources == build.manifest()["device"]["files"][name]
    (tmp_path / name).write_bytes(cubin)
    for path in [tmp_path / name, *([build.folder() / name] if name in BUILT else [])]:
        check_cubin(path, arch)


def check_cubin(path, arch):
    """A file for this architecture with all kernels, by binutils, which g++ comes with."""
    text = subprocess.run(["readelf", "-h", "-s", "-W", path], capture_output=True, text=True, check=True).stdout
    assert "NVIDIA CUDA architecture" in text
    flags = int(re.search(r"Flags:\s+0x([0-9a-f]+)", text)[1], 16)
    assert arch in (flags & 0xFF, flags >> 8 & 0xFF)  # CUDA 11 and 13 use different bytes
    assert set(re.findall(r"FUNC\s+GLOBAL\s.*\s(\w+)$", text, re.MULTILINE)) == kernels_of(arch)


def test_ptx_for_newest_architecture():
    ptx, _ = COMPILER.compile(*build.device_sources(), f"compute_{ARCHS[-1]}", build.DEVICE_OPTIONS)
    name = f"rwkv_compute_{ARCHS[-1]}.ptx"
    for text in [ptx.decode(), *([(build.folder() / name).read_text()] if name in BUILT else [])]:
        assert f".target sm_{ARCHS[-1]}" in text
        assert set(re.findall(r"\.visible \.entry (\w+)\(", text)) == kernels_of(ARCHS[-1])


def test_manifest_contents():
    manifest = build.manifest()
    assert manifest["source_hash"] == build.source_hash()
    assert manifest["torch"] == torch.__version__
    assert manifest["device"]["compiler"] == f"NVRTC {COMPILER.version}"
    assert manifest["device"]["options"] == build.DEVICE_OPTIONS


def test_compile_error(tmp_path):
    (tmp_path / "bad.cu").write_text("__global__ void f() { nonsense; }")
    with pytest.raises(
        RuntimeError, match=r'bad.cu for sm_80:\nbad.cu\(1\): error: identifier "nonsense" is undefined'
    ):
        COMPILER.compile(tmp_path / "bad.cu", {}, "sm_80", [])


def test_compiler_keeps_locale(tmp_path):
    """NVRTC 11.7 sets the locale to C, in which Python reads and writes ASCII."""
    (tmp_path / "empty.cu").write_text("")
    before = locale.getpreferredencoding(False)
    COMPILER.compile(tmp_path / "empty.cu", {}, f"sm_{ARCHS[0]}", [])
    assert locale.getpreferredencoding(False) == before


def test_no_cuda_toolkit_in_sources():
    for path in [*build.SOURCES.rglob("*.[hc]*"), *build.SOURCES.parent.glob("rwkv/kernels/*.py")]:
        assert not re.search(r"#include <cuda|CUDA_HOME|CUDAExtension|bin/nvcc", path.read_text(encoding="utf-8")), path
