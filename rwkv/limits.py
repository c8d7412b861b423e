"""How much memory there is, and how much of it this process has: GPUs by NVML, hosts by what the kernel says, cgroups and limits included."""

import contextlib
import resource
from pathlib import Path


def memory_of(gpu: bool) -> int:
    """Bytes that a run may fill: of the first GPU, 0 if there is none; or of this machine, as far as cgroup and ulimit let this process."""
    return gpu_memory()[0] if gpu else min(_physical(), _cgroup(), _address_space())


def gpu_memory(index: int = 0) -> tuple[int, int]:
    """Bytes of a GPU and those in use on it by anybody, by NVML; zeros where there is no NVIDIA GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
        found = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
    except pynvml.NVMLError:
        return 0, 0
    return int(found.total), int(found.used)


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


def _cgroup() -> int:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):  # "max": no limit
            continue
    return 1 << 62


def _address_space() -> int:
    """What ulimit -v leaves: it counts addresses, of which libraries and thread stacks take some without memory behind them."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return 1 << 62 if limit == resource.RLIM_INFINITY else max(0, limit - (_status("VmSize") - _status("VmRSS")))
