"""Kernels are compiled ahead of time without nvcc or the CUDA toolkit; missing or stale ones name
the command to run.
"""

import json
import locale
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from rwkv import compat
from rwkv.kernels import build, load, nvrtc

COMPILER = nvrtc.Compiler(compat.nvrtc())
KERNELS = {
    f"wkv4_{what}_{dtype}"
    for what in ("summary", "output", "summary_gradient", "gradient")
    for dtype in ("fp32", "bf16", "fp16")
}
KERNELS |= {"wkv4_scan", "wkv4_scan_gradient"}
KERNELS |= {f"wkv6_{what}_{kind}" for what in ("output", "gradient") for kind in ("fp32", "bf16", "fp16", "wide")}
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


def kernels_of(arch: int) -> set[str]:
    return KERNELS | TENSOR_CORES if arch >= 80 else KERNELS


ARCHS = build.all_archs()
# Compiling takes 30 s per architecture: all with RWKV_KERNELS_ALL=1, as in GitHub's CI, otherwise
# the oldest and the newest.
COMPILED = ARCHS if os.environ.get("RWKV_KERNELS_ALL") == "1" else [ARCHS[0], ARCHS[-1]]
BUILT = list(build.manifest()["device"].get("files", ()))  # for this machine's GPUs, or for all


def test_compiler_matches_torch_cuda():
    assert COMPILER.version.split(".")[0] == torch.version.cuda.split(".")[0]


def test_architectures_of_stack():
    if COMPILER.version == "11.7":
        assert ARCHS == [60, 70, 75, 80, 86]
    else:
        assert [arch for arch in COMPILER.archs if arch >= 75] == ARCHS
        assert {75, 80, 86, 90, 100, 120} <= set(ARCHS)


@pytest.mark.parametrize("arch", COMPILED)
def test_compiles_within_register_budget(arch):
    _, log = COMPILER.compile(*build.device_sources(), f"sm_{arch}", build.DEVICE_OPTIONS)
    assert "warning" not in log
    assert "error" not in log
    resources = nvrtc.resources(log)
    assert set(resources) == kernels_of(arch)
    for name, use in resources.items():
        # wkv4_gradient keeps 16 tokens and their states in registers and may use the maximum. Row
        # kernels have blocks of up to 1024 threads, hence 64 registers. Elementwise kernels aim at
        # full occupancy. wkv6 and wkv7 have the state of a head, and its gradient, in a block's
        # registers.
        rows, small = (
            ("fused_norm_fp", "fused_norm_bf", "fused_norm_any", "fused_norm_gradient", "fused_loss"),
            ("fused_gate", "fused_relu2", "fused_dropout", "quant_"),
        )
        # The scans keep a state, and the next chunk, in registers: two blocks of 128 threads a
        # multiprocessor, where the gradient has three.
        limit = (
            {"wkv7_chunk_scan": 240, "wkv7_chunk_scan_gradient": 240, "wkv7_chunk_gradient": 168}[name]
            if name in TENSOR_CORES and name not in ("wkv7_chunk_prepare", "wkv7_chunk_output")
            else 255
            if name.startswith(
                ("wkv4_gradient", "wkv6_gradient", "wkv7_gradient", "wkv7_output_128", "wkv7_output_256")
            )
            else 64
            if name.startswith(rows)
            else 48
            if name.startswith(small)
            else 128
        )
        assert use["registers"] <= limit, name
        # local memory: register spills only (72 bytes in wkv4_gradient on sm_120; more for the head
        # sizes of RWKV-7 that no published model has, and in fp32 on sm_100), independent of T
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


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
@pytest.mark.parametrize("arch", ARCHS)
def test_cubin_contains_kernels(arch):
    if f"rwkv_sm_{arch}.cubin" not in BUILT:
        pytest.skip("built for this machine's GPUs only")
    path = build.folder() / f"rwkv_sm_{arch}.cubin"
    text = subprocess.run(["readelf", "-h", "-s", "-W", path], capture_output=True, text=True, check=True).stdout
    assert "NVIDIA CUDA architecture" in text
    flags = int(re.search(r"Flags:\s+0x([0-9a-f]+)", text)[1], 16)
    assert arch in (flags & 0xFF, flags >> 8 & 0xFF)  # CUDA 11 and 13 use different bytes
    assert set(re.findall(r"FUNC\s+GLOBAL\s.*\s(\w+)$", text, re.MULTILINE)) == kernels_of(arch)


@pytest.mark.skipif(not any(name.endswith(".ptx") for name in BUILT), reason="built for this machine's GPUs only")
def test_ptx_for_newest_architecture():
    text = (build.folder() / f"rwkv_compute_{ARCHS[-1]}.ptx").read_text()
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


@pytest.fixture
def compiled_for(tmp_path, monkeypatch):
    """A kernel folder whose manifest lists the given files."""

    def make(*names: str):
        (tmp_path / "manifest.json").write_text(
            json.dumps({"source_hash": build.source_hash(), "device": {"files": {name: {} for name in names}}})
        )
        monkeypatch.setattr(build, "folder", lambda: tmp_path)

    return make


@pytest.mark.parametrize(
    ("capability", "file"),
    [
        ((6, 0), "rwkv_sm_60.cubin"),
        ((6, 1), "rwkv_sm_60.cubin"),
        ((7, 0), "rwkv_sm_70.cubin"),
        ((7, 5), "rwkv_sm_75.cubin"),
        ((8, 0), "rwkv_sm_80.cubin"),
        ((8, 6), "rwkv_sm_86.cubin"),
        ((8, 9), "rwkv_sm_86.cubin"),  # Ada runs code of sm_86
        ((9, 0), "rwkv_compute_86.ptx"),
        ((12, 0), "rwkv_compute_86.ptx"),
    ],
)
def test_device_code_for_capability(compiled_for, capability, file):
    compiled_for(*(f"rwkv_sm_{arch}.cubin" for arch in (60, 70, 75, 80, 86)), "rwkv_compute_86.ptx")
    assert build.device_code(capability).name == file


def test_no_code_for_gpu(compiled_for, monkeypatch):
    compiled_for("rwkv_sm_75.cubin", "rwkv_sm_120.cubin", "rwkv_compute_120.ptx")
    with pytest.raises(
        LookupError, match="compute capability 6.1 and the CUDA kernels are compiled for 7.5, 12.0; (use|run)"
    ):
        build.device_code((6, 1))
    compiled_for()
    with pytest.raises(LookupError, match="8.0 and the CUDA kernels are compiled for no GPU; run: make kernels"):
        build.device_code((8, 0))
    monkeypatch.setattr(build.compat, "nvrtc", lambda: None)
    with pytest.raises(LookupError, match="no NVRTC"):
        build.device_code((8, 0))


def test_missing_or_stale_library(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "folder", lambda: tmp_path)
    assert "not compiled" in build.why_unavailable()
    (tmp_path / "manifest.json").write_text('{"source_ha')  # as a full disk may leave it
    assert "not compiled" in build.why_unavailable()
    (tmp_path / "manifest.json").write_text('{"source_hash": "0123456789abcdef"}')
    assert "compiled from other sources" in build.why_unavailable()
    current = {"source_hash": build.source_hash(), "sizes": {"rwkv.so": 5}}
    (tmp_path / "manifest.json").write_text(json.dumps(current))
    assert "rwkv.so is missing; run: make kernels" in build.why_unavailable()
    (tmp_path / "rwkv.so").write_text("cut")
    assert "rwkv.so is not 5 bytes long; run: make kernels" in build.why_unavailable()
    (tmp_path / "rwkv.so").write_text("wrong")
    assert build.why_unavailable() is None
    monkeypatch.setattr(load, "_loaded", False)
    assert "does not load" in load.why_unavailable()
    assert not build.usable()


def test_failed_load_cached_until_rebuild(builds, monkeypatch):
    checks = []
    load._why_unavailable.cache_clear()  # an earlier test may have cached the same manifest time
    monkeypatch.setattr(load, "_loaded", False)
    monkeypatch.setattr(load.torch.ops, "load_library", lambda path: None)  # torch rejects a second copy in one process
    with monkeypatch.context() as patch:
        patch.setattr(
            load.build, "why_unavailable", lambda: checks.append(1) or "it is not compiled; run: make kernels"
        )
        for _ in range(3):
            assert "make kernels" in load.why_unavailable()
    assert len(checks) == 1
    (build.folder() / "manifest.json").touch()
    assert load.why_unavailable() is None


def test_loaded_library_not_rechecked(monkeypatch):
    assert load.why_unavailable() is None
    monkeypatch.setattr(build, "build_time_ns", lambda: pytest.fail("checked the files again"))
    assert load.why_unavailable() is None


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """Use a copy of the compiled kernels, which a test may corrupt. A build restores the copy and
    adds an entry to the returned list.
    """
    original, count = build.folder(), []

    def copy():
        count.append(1)
        shutil.copytree(original, tmp_path / "lib", dirs_exist_ok=True)

    copy()
    monkeypatch.setattr(build, "folder", lambda: tmp_path / "lib")
    monkeypatch.setattr(build, "_build", copy)
    count.clear()
    return count


def gpus(monkeypatch, *capabilities):
    monkeypatch.setattr(build.torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda i: capabilities[i])


def test_needed_targets(monkeypatch):
    monkeypatch.setattr(build, "all_archs", lambda: [75, 80, 86])
    monkeypatch.delenv("RWKV_KERNELS_ALL", raising=False)
    gpus(monkeypatch)
    assert build.needed_targets() == []
    gpus(monkeypatch, (8, 9), (7, 5), (8, 9))
    assert build.needed_targets() == ["sm_86", "sm_75"]
    gpus(monkeypatch, (9, 0))  # newer than the compiler
    assert build.needed_targets() == ["compute_86"]
    gpus(monkeypatch, (6, 1))  # older than the stack supports
    assert build.needed_targets() == []
    monkeypatch.setenv("RWKV_KERNELS_ALL", "1")
    assert build.needed_targets() == ["sm_86", "sm_80", "sm_75", "compute_86"]


def test_build_for_new_gpu(builds, monkeypatch):
    manifest = build.manifest()
    manifest["device"]["files"] = {}
    (build.folder() / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.delenv("RWKV_KERNELS_ALL", raising=False)
    gpus(monkeypatch)
    build.main()
    assert builds == []
    gpus(monkeypatch, (8, 0))
    build.main()
    assert builds == [1]


def test_current_build_skipped(builds, capsys, monkeypatch):
    monkeypatch.delenv("RWKV_KERNELS_ALL", raising=False)
    build.main()
    assert builds == []
    assert "is current" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["rwkv.so", "manifest.json", *BUILT[:1], *BUILT[-1:]])
def test_rebuild_after_damage(builds, broken):
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:100])):
        damage(build.folder() / broken)
        assert "run: make kernels" in build.why_unavailable()
        builds.clear()
        build.main()
        assert builds == [1]
        assert build.why_unavailable() is None


def test_rebuild_unloadable_library(builds):
    library = build.library()
    library.write_bytes(b"?" * library.stat().st_size)
    build.main()
    assert builds == [1]


def test_interrupted_build(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "folder", lambda: tmp_path)
    (tmp_path / "manifest.json").write_text(f'{{"source_hash": "{build.source_hash()}"}}')

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_build_host", stop)
    monkeypatch.setattr(build, "_build_device", lambda: {})
    with pytest.raises(KeyboardInterrupt):
        build.build()
    assert "make kernels" in build.why_unavailable()


def test_parallel_compilation(monkeypatch):
    started, barrier = [], threading.Barrier(2)

    def compiled(_, target):
        started.append(target)
        if len(started) <= 2:
            barrier.wait(timeout=30)  # raises unless a second one starts at the same time
        return target, {}

    monkeypatch.setattr(build, "_compile", compiled)
    monkeypatch.setenv("RWKV_KERNELS_ALL", "1")
    monkeypatch.setattr(build.os, "cpu_count", lambda: 2)
    assert list(build._build_device()["files"]) == [*(f"sm_{arch}" for arch in reversed(ARCHS)), f"compute_{ARCHS[-1]}"]


def test_concurrent_builds(tmp_path):
    """The second build waits for the first and does nothing."""
    program = f"""
import pathlib, sys, time
from rwkv.kernels import build
folder = pathlib.Path({str(tmp_path)!r})
build.folder = lambda: folder
build.usable = lambda: (folder / "done").exists()
def slow():
    with open(folder / "builds", "a") as file: file.write("x")
    time.sleep(1)
    (folder / "done").touch()
build._build = slow
build.build()
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=build.SOURCES.parent) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_ninja_next_to_python():
    """ninja of the environment is found without activating it."""
    program = """
from rwkv import compat
from rwkv.kernels import build
found = compat.cpp_extension()
def stop(*_, **__): found.verify_ninja_availability(); print("found"); raise SystemExit
found.load = stop
build._build_host()
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=build.SOURCES.parent,
        env={"PATH": "/nowhere"},
        check=False,
    )
    assert result.stdout == "found\n", result.stderr


def test_no_cuda_toolkit_in_sources():
    for path in [*build.SOURCES.rglob("*.[hc]*"), *build.SOURCES.parent.glob("rwkv/kernels/*.py")]:
        assert not re.search(r"#include <cuda|CUDA_HOME|CUDAExtension|bin/nvcc", path.read_text(encoding="utf-8")), path
