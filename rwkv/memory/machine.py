"""How much memory there is, and how much of it this process has: GPUs by torch, hosts by what the kernel says, cgroups and limits included."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_UNLIMITED = 1 << 62


def use_gpu(accelerator: str) -> bool:
    """Whether this value of --accelerator means a GPU on this machine."""
    import torch

    return accelerator != "cpu" and torch.cuda.is_available()


def memory_of(gpu: bool, devices: int = 1) -> int:
    """Bytes that a run may fill: of the smallest of the first `devices` GPUs that torch sees (a MIG instance is one), 0 if that is unknown; or of this
    machine, as far as cgroups and ulimit let this process."""
    if not gpu:
        return min(_physical(), _cgroup(), _address_space())
    import torch

    if not torch.cuda.is_available():
        return 0
    found = []
    for i in range(max(1, min(devices, torch.cuda.device_count()))):
        properties = torch.cuda.get_device_properties(i)  # makes no CUDA context, which would take memory itself
        shared = getattr(properties, "is_integrated", 0)  # with the host
        found.append(
            min(int(properties.total_memory), memory_of(gpu=False)) if shared else int(properties.total_memory)
        )
    return min(found)


def gpu_used(index: int) -> int:
    """Bytes in use, by anybody, on the GPU that torch calls `index`; 0 if that is unknown. For a process that computes on it already."""
    import torch

    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError:
        return 0
    return total - free


def rss() -> int:
    """Bytes of memory that this process has now."""
    return _status("VmRSS")


def rss_peak(restart: bool = False) -> int:
    """The most that it had since it began, or since the last `restart`, where the kernel lets it begin anew."""
    peak = _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if restart:
        with contextlib.suppress(OSError):  # no such file, or no right to it: the peak then is that since the beginning
            Path("/proc/self/clear_refs").write_text("5")
    return peak


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # no Linux
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _physical() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _cgroup(process: Path = Path("/proc/self")) -> int:
    """The smallest memory limit of the control groups that a process is in, from its own up to the root of what is mounted; both versions."""
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
            _, controllers, path = group.split(":", 2)  # of version 2 the controllers are empty
            if controller in controllers.split(","):
                found += _limits_along(Path(point.replace("\\040", " ")), root, path, name)
    return min(found)


def _limits_along(mounted: Path, root: str, path: str, name: str) -> Iterator[int]:
    """The limits in the files `name` of control group `path` and of those above it, in a hierarchy of which `root` is mounted."""
    try:
        group = PurePosixPath(path).relative_to(root)
    except ValueError:  # outside of what is mounted, as in a container that has a mount of its own
        group = PurePosixPath()
    if ".." in group.parts:
        group = PurePosixPath()
    for level in (group, *group.parents):
        try:
            yield int((mounted / level / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # no such file; "max": no limit
            continue


def _address_space() -> int:
    """What ulimit -v leaves: it counts addresses, of which libraries and thread stacks take some without memory behind them."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return _UNLIMITED if limit == resource.RLIM_INFINITY else max(0, limit - (_status("VmSize") - _status("VmRSS")))
