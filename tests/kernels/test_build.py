"""Kernels are compiled ahead of time, without nvcc or a toolkit; messages about missing or stale ones say what to run."""

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
ONE, TWO = (
    ("fp32", "bf16", "fp16", "any"),
    ("fp32", "bf16", "fp16", "fp32_bf16", "fp32_fp16", "any"),
)  # dtypes; of stream and inside
KERNELS |= {
    f"fused_{what}_{dtype}"
    for what in ("gate", "gate_gradient", "mix", "mix_gradient", "relu2", "relu2_gradient", "dropout", "loss")
    for dtype in ONE
}
KERNELS |= {f"fused_{what}_{dtype}" for what in ("norm", "norm_gradient", "norm_sums") for dtype in TWO}
ARCHS = build.all_archs()
# Each takes ten seconds: all with RWKV_KERNELS_ALL=1 and in images, else the oldest, Ampere and the newest.
COMPILED = ARCHS if os.environ.get("RWKV_KERNELS_ALL") == "1" else sorted({ARCHS[0], 80, ARCHS[-1]})
BUILT = list(build.manifest()["device"].get("files", ()))  # of this machine's GPUs, or of all


def test_the_compiler_is_the_one_of_torchs_cuda():
    assert COMPILER.version.split(".")[0] == torch.version.cuda.split(".")[0]


def test_all_archs_are_those_of_the_stack():
    if COMPILER.version == "11.7":
        assert ARCHS == [60, 70, 75, 80, 86]
    else:
        assert [arch for arch in COMPILER.archs if arch >= 75] == ARCHS
        assert {75, 80, 86, 90, 100, 120} <= set(ARCHS)


@pytest.mark.parametrize("arch", COMPILED)
def test_it_compiles_without_warnings_within_the_budget(arch):
    _, log = COMPILER.compile(*build.device_sources(), f"sm_{arch}", build.DEVICE_OPTIONS)
    assert "warning" not in log
    assert "error" not in log
    used = nvrtc.resources(log)
    assert set(used) == KERNELS
    for name, use in used.items():
        # wkv4_gradient has 16 tokens and their states in registers: it may have all that a thread can have. A block that is as wide as a row
        # has up to 1024 threads, of 64 each; what goes element by element leaves room for all that an SM can run, or nearly so
        rows, small = (
            ("fused_norm_fp", "fused_norm_bf", "fused_norm_any", "fused_norm_gradient", "fused_loss"),
            ("fused_gate", "fused_relu2", "fused_dropout"),
        )
        most = (
            255
            if name.startswith("wkv4_gradient")
            else 64
            if name.startswith(rows)
            else 48
            if name.startswith(small)
            else 128
        )
        assert use["registers"] <= most, name
        # local memory: nothing but what the register allocator may spill, whatever T is (72 bytes in wkv4_gradient on sm_120)
        assert max(use["stack"], use["spill_stores"], use["spill_loads"]) <= 80, name
    name = f"rwkv_sm_{arch}.cubin"
    assert name not in BUILT or used == build.manifest()["device"]["files"][name]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if f"rwkv_sm_{arch}.cubin" in BUILT])
def test_a_cubin_holds_the_kernels_for_its_arch(arch):
    path = build.folder() / f"rwkv_sm_{arch}.cubin"
    text = subprocess.run(["readelf", "-h", "-s", "-W", path], capture_output=True, text=True, check=True).stdout
    assert "NVIDIA CUDA architecture" in text
    flags = int(re.search(r"Flags:\s+0x([0-9a-f]+)", text)[1], 16)
    assert arch in (flags & 0xFF, flags >> 8 & 0xFF)  # CUDA 11 and 13 put it into different bytes
    assert set(re.findall(r"FUNC\s+GLOBAL\s.*\s(\w+)$", text, re.MULTILINE)) == KERNELS


@pytest.mark.skipif(not any(name.endswith(".ptx") for name in BUILT), reason="built for this machine's GPUs alone")
def test_the_ptx_is_for_the_newest_arch():
    text = (build.folder() / f"rwkv_compute_{ARCHS[-1]}.ptx").read_text()
    assert f".target sm_{ARCHS[-1]}" in text
    assert set(re.findall(r"\.visible \.entry (\w+)\(", text)) == KERNELS


def test_the_manifest_says_how_it_was_made():
    manifest = build.manifest()
    assert manifest["source_hash"] == build.source_hash()
    assert manifest["torch"] == torch.__version__
    assert manifest["device"]["compiler"] == f"NVRTC {COMPILER.version}"
    assert manifest["device"]["options"] == build.DEVICE_OPTIONS


def test_source_that_does_not_compile_shows_the_compilers_words(tmp_path):
    (tmp_path / "bad.cu").write_text("__global__ void f() { nonsense; }")
    with pytest.raises(
        RuntimeError, match=r'bad.cu for sm_80:\nbad.cu\(1\): error: identifier "nonsense" is undefined'
    ):
        COMPILER.compile(tmp_path / "bad.cu", {}, "sm_80", [])


def test_compiling_leaves_the_locale_alone(tmp_path):
    """NVRTC 11.7 sets its thread's to C, after which Python would read and write ASCII there."""
    (tmp_path / "empty.cu").write_text("")
    before = locale.getpreferredencoding(False)
    COMPILER.compile(tmp_path / "empty.cu", {}, f"sm_{ARCHS[0]}", [])
    assert locale.getpreferredencoding(False) == before


@pytest.fixture
def compiled_for(tmp_path, monkeypatch):
    """A folder whose manifest lists these files."""

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
def test_a_gpu_gets_the_code_that_fits_it(compiled_for, capability, file):
    compiled_for(*(f"rwkv_sm_{arch}.cubin" for arch in (60, 70, 75, 80, 86)), "rwkv_compute_86.ptx")
    assert build.device_code(capability).name == file


def test_a_gpu_that_no_code_fits_is_told_what_there_is(compiled_for, monkeypatch):
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


def test_a_missing_or_stale_library_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "folder", lambda: tmp_path)
    assert "not compiled" in build.why_unavailable()
    (tmp_path / "manifest.json").write_text('{"source_ha')  # what a full disk may leave
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


def test_what_was_refused_is_looked_at_again_when_make_kernels_has_run_and_not_before(copied, monkeypatch):
    looked = []
    load._why_unavailable.cache_clear()  # an earlier test may have asked about a manifest of the same time
    monkeypatch.setattr(load, "_loaded", False)
    monkeypatch.setattr(
        load.torch.ops, "load_library", lambda path: None
    )  # a second copy in one process would be refused by torch
    with monkeypatch.context() as patch:
        patch.setattr(
            load.build, "why_unavailable", lambda: looked.append(1) or "it is not compiled; run: make kernels"
        )
        for _ in range(3):
            assert "make kernels" in load.why_unavailable()
    assert len(looked) <= 1
    (build.folder() / "manifest.json").touch()
    assert load.why_unavailable() is None


def test_what_is_loaded_is_not_looked_at_again(monkeypatch):
    assert load.why_unavailable() is None
    monkeypatch.setattr(build, "stamp", lambda: pytest.fail("a file was looked at"))
    assert load.why_unavailable() is None


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The compiled units in a folder that a test may break; building there counts and copies them again."""
    true, builds = build.folder(), []

    def copy():
        builds.append(1)
        shutil.copytree(true, tmp_path / "lib", dirs_exist_ok=True)

    copy()
    monkeypatch.setattr(build, "folder", lambda: tmp_path / "lib")
    monkeypatch.setattr(build, "_build", copy)
    builds.clear()
    return builds


def gpus(monkeypatch, *capabilities):
    monkeypatch.setattr(build.torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda i: capabilities[i])


def test_needed_targets_are_those_of_the_gpus_or_all(monkeypatch):
    monkeypatch.setattr(build, "all_archs", lambda: [75, 80, 86])
    monkeypatch.delenv("RWKV_KERNELS_ALL", raising=False)
    gpus(monkeypatch)
    assert build.needed_targets() == []
    gpus(monkeypatch, (8, 9), (7, 5), (8, 9))
    assert build.needed_targets() == ["sm_86", "sm_75"]
    gpus(monkeypatch, (9, 0))  # newer than the compiler
    assert build.needed_targets() == ["compute_86"]
    gpus(monkeypatch, (6, 1))  # older than the stack: the other one has code
    assert build.needed_targets() == []
    monkeypatch.setenv("RWKV_KERNELS_ALL", "1")
    assert build.needed_targets() == ["sm_86", "sm_80", "sm_75", "compute_86"]


def test_a_gpu_without_code_is_built_for(copied, monkeypatch):
    manifest = build.manifest()
    manifest["device"]["files"] = {}
    (build.folder() / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.delenv("RWKV_KERNELS_ALL", raising=False)
    gpus(monkeypatch)
    build.main()
    assert copied == []
    gpus(monkeypatch, (8, 0))
    build.main()
    assert copied == [1]


def test_what_is_current_is_not_built_again(copied, capsys):
    build.main()
    assert copied == []
    assert "is current" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["rwkv.so", "manifest.json", *BUILT[:1], *BUILT[-1:]])
def test_make_kernels_mends_what_it_is_said_to_mend(copied, broken):
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:100])):
        damage(build.folder() / broken)
        assert "run: make kernels" in build.why_unavailable()
        copied.clear()
        build.main()
        assert copied == [1]
        assert build.why_unavailable() is None


def test_a_library_that_does_not_load_is_built_again(copied):
    library = build.library()
    library.write_bytes(b"?" * library.stat().st_size)
    build.main()
    assert copied == [1]


def test_a_build_that_is_broken_off_leaves_nothing_usable(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "folder", lambda: tmp_path)
    (tmp_path / "manifest.json").write_text(f'{{"source_hash": "{build.source_hash()}"}}')

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_build_host", stop)
    monkeypatch.setattr(build, "_build_device", lambda: {})
    with pytest.raises(KeyboardInterrupt):
        build.build()
    assert "make kernels" in build.why_unavailable()


def test_as_many_targets_are_compiled_at_a_time_as_there_are_cores(monkeypatch):
    begun, two = [], threading.Barrier(2)

    def compiled(_, target):
        begun.append(target)
        if len(begun) <= 2:
            two.wait(timeout=30)  # raises if no second one begins
        return target, {}

    monkeypatch.setattr(build, "_compile", compiled)
    monkeypatch.setenv("RWKV_KERNELS_ALL", "1")
    monkeypatch.setattr(build.os, "cpu_count", lambda: 2)
    assert list(build._build_device()["files"]) == [*(f"sm_{arch}" for arch in reversed(ARCHS)), f"compute_{ARCHS[-1]}"]


def test_two_builds_at_once_make_one(tmp_path):
    """The second waits for the first and finds nothing left to do."""
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
    both = [subprocess.Popen([sys.executable, "-c", program], cwd=build.SOURCES.parent) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_ninja_is_found_beside_python():
    """The environment's own: it need not be activated, and the system need not have one."""
    program = """
from rwkv import compat
from rwkv.kernels import build
found = compat.cpp_extension()
def stop(*_, **__): found.verify_ninja_availability(); print("found"); raise SystemExit
found.load = stop
build._build_host()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=build.SOURCES.parent,
        env={"PATH": "/nowhere"},
        check=False,
    )
    assert done.stdout == "found\n", done.stderr


def test_no_toolkit_is_asked_for():
    for path in [*build.SOURCES.rglob("*.[hc]*"), *build.SOURCES.parent.glob("rwkv/kernels/*.py")]:
        assert not re.search(r"#include <cuda|CUDA_HOME|CUDAExtension|bin/nvcc", path.read_text(encoding="utf-8")), path
