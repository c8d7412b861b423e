"""Builds of the kernels: what is compiled for which GPU and when it is rebuilt; errors name the
command to run.
"""

import json
import shutil
import threading

import pytest

from rwkv.kernels import build, load
from tests.waiting import LIMIT

BUILT = list(build.manifest()["device"].get("files", ()))  # for this machine's GPUs, or for all


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


def test_sources_changed_during_build(tmp_path, monkeypatch):
    hashes = ["before"]
    monkeypatch.setattr(build, "folder", lambda: tmp_path)
    monkeypatch.setattr(build, "source_hash", lambda: hashes[-1])
    monkeypatch.setattr(build, "_build_host", lambda: hashes.append("after"))
    monkeypatch.setattr(build, "_build_device", lambda: {})
    build._build()
    assert "hash before, now after" in build.why_unavailable()


def test_parallel_compilation(monkeypatch):
    started, barrier = [], threading.Barrier(2)

    def compiled(_, target):
        started.append(target)
        if len(started) <= 2:
            barrier.wait(timeout=LIMIT)  # raises unless a second one starts at the same time
        return target, {}

    monkeypatch.setattr(build, "_compile", compiled)
    monkeypatch.setenv("RWKV_KERNELS_ALL", "1")
    monkeypatch.setattr(build.os, "cpu_count", lambda: 2)
    archs = build.all_archs()
    assert list(build._build_device()["files"]) == [*(f"sm_{arch}" for arch in reversed(archs)), f"compute_{archs[-1]}"]


def test_concurrent_builds(tmp_path, start):
    """The second build waits for the first and does nothing."""
    (tmp_path / "program.py").write_text(f"""
import pathlib, time
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
""")
    processes = [start(tmp_path / "program.py") for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_ninja_next_to_python(tmp_path, start):
    """ninja of the environment is found without activating it."""
    (tmp_path / "program.py").write_text("""
from rwkv import compat
from rwkv.kernels import build
found = compat.cpp_extension()
def stop(*_, **__): found.verify_ninja_availability(); print("found"); raise SystemExit
found.load = stop
build._build_host()
""")
    result = start(tmp_path / "program.py", environment={"PATH": "/nowhere"}).result()
    assert result.stdout == "found\n", result.stderr
