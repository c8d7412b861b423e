"""Available and used memory: of GPUs from torch; of the host from the kernel, with cgroup limits
and ulimits.
"""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from rwkv.errors import UserError

_UNLIMITED = 1 << 62  # bytes; more than any limit


def use_gpu(accelerator: str) -> bool:
    """Whether this value of --accelerator means a GPU on this machine."""
    import torch

    return accelerator != "cpu" and torch.cuda.is_available()


def check_accelerator(accelerator: str) -> None:
    """Raises UserError for --accelerator gpu on a machine without one."""
    if accelerator == "gpu" and not use_gpu(accelerator):
        raise UserError("--accelerator gpu: torch sees no GPU; check nvidia-smi, or use --accelerator cpu")


def memory_of(gpu: bool, devices: int = 1) -> int:
    """Total memory in bytes that a run may use: of the smallest of the first `devices` GPUs (or MIG
    instances), 0 if unknown; or of the host, within cgroup limits and ulimit.
    """
    if not gpu:
        return min(_physical(), _cgroup(), _address_space())
    import torch

    if not torch.cuda.is_available():
        return 0
    found = []
    for i in range(max(1, min(devices, torch.cuda.device_count()))):
        properties = torch.cuda.get_device_properties(i)  # does not create a CUDA context
        shared = getattr(properties, "is_integrated", 0)  # GPU and host share memory
        found.append(
            min(int(properties.total_memory), memory_of(gpu=False)) if shared else int(properties.total_memory)
        )
    return min(found)


def gpu_used(index: int) -> int:
    """Bytes in use by all processes on GPU `index`; 0 if unknown. Creates a CUDA context if there
    is none.
    """
    import torch

    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError:
        return 0
    return total - free


def rss() -> int:
    """Resident memory of this process in bytes."""
    return _status("VmRSS")


def rss_peak(restart: bool = False) -> int:
    """Peak resident memory in bytes, since the process started or since the last call with
    `restart`, if the kernel supports resetting it.
    """
    peak = _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if restart:
        with contextlib.suppress(OSError):  # not supported or not permitted
            Path("/proc/self/clear_refs").write_text("5")
    return peak


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _physical() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _cgroup(process: Path = Path("/proc/self")) -> int:
    """The smallest memory limit among a process's cgroup and its mounted ancestors (cgroup v1 and
    v2).
    """
    try:
        mounts, groups = ((process / name).read_text(encoding="utf-8").splitlines() for name in ("mountinfo", "cgroup"))
    except OSError:
        return _UNLIMITED
    found = [_UNLIMITED]
    for mount in mounts:
        place, _, system = mount.partition(" - ")  # … root mount-point … - type source options (proc(5))
        root, point = place.split()[3:5]
        if system.startswith("cgroup2 "):
            name, controller = "memory.max", ""
        elif system.startswith("cgroup ") and "memory" in system.split()[-1].split(","):
            name, controller = "memory.limit_in_bytes", "memory"
        else:
            continue
        for group in groups:
            _, controllers, path = group.split(":", 2)  # no controllers in v2
            if controller in controllers.split(","):
                found += _limits_along(Path(point.replace("\\040", " ")), root, path, name)
    return min(found)


def _limits_along(mounted: Path, root: str, path: str, name: str) -> Iterator[int]:
    """The limits in files `name` of cgroup `path` and its ancestors, in a hierarchy whose `root` is
    mounted at `mounted`.
    """
    try:
        group = PurePosixPath(path).relative_to(root)
    except ValueError:  # not below the mount, e.g. in a container
        group = PurePosixPath()
    if ".." in group.parts:
        group = PurePosixPath()
    for level in (group, *group.parents):
        try:
            yield int((mounted / level / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # no such file; "max": no limit
            continue


def _address_space() -> int:
    """The memory that ulimit -v leaves: the limit without address space that is mapped but not
    resident (libraries, thread stacks).
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return _UNLIMITED if limit == resource.RLIM_INFINITY else max(0, limit - (_status("VmSize") - _status("VmRSS")))
