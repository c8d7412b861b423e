"""doctor finds problems, gives remedies, and works without a GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from rwkv import compat, doctor
from rwkv.kernels import build, load
from rwkv.wkv import deviation


def check(name, folder="."):
    return next(finding for finding in doctor.run_checks(folder) if finding.name == name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_failure_without_gpu(script):
    result = script("doctor.py", fresh=True)
    assert "FAIL" not in result.stdout
    assert "training runs on the CPU" in result.stdout
    assert "of the reference" in result.stdout


def test_json_output(script, tmp_path):
    findings = json.loads(script("doctor.py", "--json", "true", "--folder", tmp_path).stdout)
    assert {"Python", "torch", "packages", "WKV on the CPU", "DeepSpeed", "disk", "writable"} <= {
        finding["name"] for finding in findings
    }
    for finding in findings:
        assert set(finding) == {"name", "status", "found", "remedy"}
        assert (finding["status"] == "ok") == (finding["remedy"] == ""), finding


def test_exit_status(script, tmp_path):
    closed = tmp_path / "closed"
    closed.touch()  # a file in place of a folder: not writable even for root
    result = script("doctor.py", "--folder", closed, status=1)
    assert "FAIL  writable" in result.stdout
    assert "error" in result.stdout


def test_missing_or_wrong_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "folder", lambda: tmp_path)
    monkeypatch.setattr(load, "_loaded", False)
    finding = check("WKV on the CPU")
    assert (finding.status, finding.found) == ("warn", f"not compiled for torch {torch.__version__}")
    assert "make kernels" in finding.remedy
    monkeypatch.undo()
    assert load.why_unavailable() is None
    assert doctor._check_wkv("x", torch.device("cpu"), "lib").status == "ok"
    for name, broken in (
        ("wkv4", lambda *inputs: (inputs[3] * inputs[0] + inputs[1] * inputs[2], None)),
        ("wkv6", lambda r, w, k, v, u: (r * k * v + w + u, None)),
        ("wkv7", lambda *inputs: (sum(inputs), None)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(deviation, name, broken)
            wrong = doctor._check_wkv("x", torch.device("cpu"), "lib")
        assert wrong.status == "fail"
        assert "differs from the reference by" in wrong.found


def test_wrong_or_failing_time_mix(monkeypatch):
    assert doctor._check_time_mix("x", torch.device("cpu")).status == "ok"

    def wrong(x, v_first, p, state, run=deviation.time_mix, **options):
        y, last = run(x, v_first, p, state, **options)
        return (y if options["impl"] == "reference" else y * 1.01), last

    def failing(x, *given, run=deviation.time_mix, **options):
        if options["impl"] != "reference":
            raise RuntimeError("cuLaunchKernel fused_keys_fp32: no")
        return run(x, *given, **options)

    for broken, found in ((wrong, "from the reference"), (failing, "cuLaunchKernel fused_keys_fp32: no")):
        with monkeypatch.context() as patched:
            patched.setattr(deviation, "time_mix", broken)
            finding = doctor._check_time_mix("x", torch.device("cpu"))
        assert finding.status == "fail"
        assert found in finding.found
        assert "RWKV_FUSED=0" in finding.remedy


def test_package_differs_from_lock(monkeypatch, tmp_path):
    (tmp_path / "numpy-0.1.dist-info").mkdir()
    (tmp_path / "numpy-0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = check("packages")
    assert finding.status == "warn"
    assert "numpy 0.1 (locked" in finding.found
    assert f"make venv STACK={compat.stack()}" in finding.remedy


def test_nvcc_and_ninja_optional(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    assert (check("nvcc").status, check("nvcc").found) == ("ok", "none: not needed")
    assert (check("ninja").status, check("ninja").found) == ("ok", "none; the kernels are compiled already")
    monkeypatch.setattr(build, "folder", lambda: tmp_path)
    assert (check("ninja").status, check("ninja").remedy) == ("warn", "run make venv to install it")
    for name, expected in (("nvcc", "Cuda compilation tools, release 11.7, V11.7.99"), ("ninja", "1.13.0")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{expected}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "11.7")
    assert check("nvcc").found == "11.7, DeepSpeed can compile its own CUDA ops"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert check("nvcc").found == "11.7, not needed; DeepSpeed's own CUDA ops would need 13.0"
    assert check("ninja").found == "1.13.0"


def test_broken_deepspeed_op(monkeypatch):
    real, missing = doctor.importlib.import_module, "libcurand.so.10: cannot open shared object file"

    def fake_import(name, package=None):
        if name == "deepspeed.git_version_info":
            return SimpleNamespace(installed_ops={"cpu_adam": True, "fused_adam": True, "sparse_attn": False})
        if name == "deepspeed.ops.adam.cpu_adam_op":  # as in an image whose base has no CUDA
            raise ImportError(missing)
        return SimpleNamespace() if name == "deepspeed.ops.adam.fused_adam_op" else real(name, package)

    monkeypatch.setattr(doctor.importlib, "import_module", fake_import)
    assert compat.deepspeed_ops() == {"cpu_adam": missing, "fused_adam": ""}
    assert compat.deepspeed_adam(offloaded=True) is None
    assert compat.deepspeed_adam(offloaded=False) is not None
    finding = check("DeepSpeed")
    assert finding.status == "warn"
    assert f"cpu_adam does not load ({missing})" in finding.found


@pytest.mark.parametrize(
    ("driver", "cuda", "status"),
    [
        ("525.60.13", "11.7", "ok"),
        ("470.57", "11.7", "warn"),
        ("418.40", "11.7", "fail"),
        ("535.1", "13.0", "fail"),
        ("580.159", "13.0", "ok"),
    ],
)
def test_old_driver(monkeypatch, driver, cuda, status):
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    findings = list(doctor._gpus())
    assert findings[0].status == status
    assert ("update the driver" in findings[0].remedy) == (status != "ok")


def with_gpu(monkeypatch, capability, archs):
    properties = SimpleNamespace(name="Some GPU", total_memory=24 << 30, major=capability[0], minor=capability[1])
    monkeypatch.setattr(doctor, "_driver", lambda: "999.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    return list(doctor._gpus())[1]


def test_gpu_unsupported_by_torch(monkeypatch):
    ampere = ["sm_37", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86"]
    assert with_gpu(monkeypatch, (8, 9), ampere).status == "ok"  # Ada runs code for sm_86
    hopper = with_gpu(monkeypatch, (9, 0), ampere)
    assert hopper.status == "fail"
    assert "use the other stack" in hopper.remedy
    assert "24 GiB, compute capability 9.0" in hopper.found


def test_driver_without_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "_driver", lambda: "999.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [finding.status for finding in doctor._gpus()][-1] == "fail"
    assert "nvidia-smi" in list(doctor._gpus())[-1].remedy


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    # ok, as the kernels are compiled already
    assert "C++ compiler" in {finding.name for finding in doctor._compilers() if finding.status == "ok"}
    monkeypatch.setattr(build, "folder", lambda: tmp_path)
    assert (
        "apt install g++" in next(finding for finding in doctor._compilers() if finding.name == "C++ compiler").remedy
    )


def test_low_disk_and_memory(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20, free=1 << 30))
    assert "--ipc=host" in check("shared memory").remedy
    assert "free some space" in check("disk").remedy


def test_failing_check_does_not_stop_others(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: 1 / 0)
    findings = list(doctor.run_checks())
    assert (findings[0].name, findings[0].status) == ("python", "warn")
    assert "ZeroDivisionError" in findings[0].found
    assert len(findings) > 10


def test_run_folder_need_not_exist(tmp_path):
    found = {finding.name: finding for finding in doctor.run_checks(tmp_path / "new/run")}
    assert found["disk"].found.endswith("GiB free")
    assert found["writable"].found.startswith("run folder")
    assert not (tmp_path / "new").exists()


def test_writes_nothing(tmp_path):
    list(doctor.run_checks(tmp_path))
    assert list(tmp_path.iterdir()) == []
