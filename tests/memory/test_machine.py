"""Memory limits of cgroups at every level, and the memory of the visible GPUs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv.memory import machine

MIB = 1 << 20


@pytest.fixture
def cgroups(tmp_path):
    """Create the /proc files of a process, and cgroup hierarchies: (version, root of the mount,
    path of the process, {group: limit}).
    """

    def make(*hierarchies) -> Path:
        groups, mounts = [], ["22 1 0:20 / /proc rw - proc proc rw", "23 1 0:21 / /run rw - tmpfs  rw"]
        for i, (version, root, path, values) in enumerate(hierarchies):
            mount_point = tmp_path / f"fs{i} with a space"
            for group, limit in values.items():
                (mount_point / group).mkdir(parents=True, exist_ok=True)
                (mount_point / group / {1: "memory.limit_in_bytes", 2: "memory.max"}[version]).write_text(f"{limit}\n")
            system = {1: "cgroup cgroup rw,memory", 2: "cgroup2 cgroup2 rw,nsdelegate"}[version]
            mounts.append(
                f"3{i} 1 0:3{i} {root} {str(mount_point).replace(' ', chr(92) + '040')} rw,nosuid shared:9 - {system}"
            )
            groups.append({1: f"7:cpu,cpuacct:/elsewhere\n4:memory:{path}", 2: f"0::{path}"}[version])
        (tmp_path / "cgroup").write_text("\n".join(groups) + "\n")
        (tmp_path / "mountinfo").write_text("\n".join(mounts) + "\n")
        return tmp_path

    return make


NONE = 1 << 62
CASES = {
    "a job of Slurm or systemd": ([(2, "/", "/a/b/c", {"a": "max", "a/b": 500 * MIB, "a/b/c": "max"})], 500 * MIB),
    "the lowest of two": ([(2, "/", "/a/b", {"a": 300 * MIB, "a/b": 400 * MIB})], 300 * MIB),
    "version 1": (
        [(1, "/", "/slurm/job_1/step_0", {"slurm/job_1": 200 * MIB, "slurm/job_1/step_0": 0x7FFFFFFFFFFFF000})],
        200 * MIB,
    ),
    "both versions": ([(2, "/", "/a", {"a": 900 * MIB}), (1, "/", "/b", {"b": 800 * MIB})], 800 * MIB),
    "a container with a namespace": ([(2, "/", "/", {".": 700 * MIB})], 700 * MIB),
    "a container without one": ([(2, "/docker/1f", "/docker/1f/x", {".": 600 * MIB, "x": "max"})], 600 * MIB),
    "a container that was moved": ([(2, "/docker/1f", "/docker/2e", {".": 600 * MIB})], 600 * MIB),
    "outside the namespace": ([(2, "/", "/../../system", {".": 650 * MIB})], 650 * MIB),
    "a deleted group": ([(2, "/", "/a/gone", {"a": 650 * MIB})], 650 * MIB),
    "no limit": ([(2, "/", "/a", {"a": "max"})], NONE),
    "no hierarchy": ([], NONE),
}


@pytest.mark.parametrize("case", CASES)
def test_smallest_cgroup_limit(cgroups, case):
    hierarchies, limit = CASES[case]
    assert machine._cgroup(cgroups(*hierarchies)) == limit


def test_no_proc_no_limit(tmp_path):
    assert machine._cgroup(tmp_path / "none") == NONE


def test_gpu_memory_of_visible_devices(monkeypatch):
    """NVML's device order ignores CUDA_VISIBLE_DEVICES and MIG instances, so torch's is used."""
    sizes, shared = [24, 8, 80], [0, 0, 1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(total_memory=sizes[i] * 10**9, is_integrated=shared[i]),
    )
    monkeypatch.setattr(machine, "_physical", lambda: 70 * 10**9)
    monkeypatch.setattr(machine, "_cgroup", lambda: 60 * 10**9)
    assert machine.memory_of(gpu=True) == 24 * 10**9
    assert machine.memory_of(gpu=True, devices=8) == 8 * 10**9
    sizes[:], shared[:] = [128], [1]  # the GPU's memory is the host's
    assert machine.memory_of(gpu=True) == 60 * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (3 * MIB, 10 * MIB))
    assert machine.gpu_used(0) == 7 * MIB

    def unsupported(i):
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(torch.cuda, "mem_get_info", unsupported)
    assert machine.gpu_used(0) == 0


def test_gpu_memory_without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.memory_of(gpu=True) == 0
