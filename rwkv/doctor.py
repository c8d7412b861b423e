"""Check whether this machine and environment can train; every problem has a remedy."""

import contextlib
import importlib
import importlib.metadata
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.markers import Marker

from rwkv import compat
from rwkv.commands import target
from rwkv.kernels import build, load
from rwkv.wkv import deviation

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
_DEVIATION = 1e-4  # from the reference: sums over 200 tokens in fp32, in another order
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """Result of a check. "fail": training will not run correctly; "warn": it runs, but slower or
    closer to a limit.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def run_checks(folder: str | Path = ".") -> Iterator[Finding]:
    """Run all checks; `folder` is where runs will write. Changes and downloads nothing."""
    for check in (
        _python,
        _torch,
        _packages,
        _gpus,
        _compilers,
        _kernels,
        _deepspeed,
        _shared_memory,
        _memory,
        _entropy,
    ):
        yield from _guarded(check)
    yield from _guarded(_disk, Path(folder))
    yield from _guarded(_writable, Path(folder))


def _guarded(check: Callable[..., Iterator[Finding]], *arguments: Path) -> Iterator[Finding]:
    try:
        yield from check(*arguments)
    except Exception as error:  # a failing check must not stop the others
        yield Finding(
            check.__name__.strip("_"), "warn", f"check failed ({type(error).__name__}: {error})", "please report this"
        )


def _warn_if(bad: bool, name: str, found: str, remedy: str) -> Finding:
    """A warning with a remedy if `bad`, else "ok"."""
    return Finding(name, "warn" if bad else "ok", found, remedy if bad else "")


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    wanted = compat.pythons()
    fits = ".".join(platform.python_version_tuple()[:2]) in wanted
    yield _warn_if(not fits, "Python", found, f"this stack is locked for Python {', '.join(wanted)}: make venv")


def _torch() -> Iterator[Finding]:
    cuda = torch.version.cuda
    yield Finding(
        "torch",
        "ok",
        f"{torch.__version__}, " + (f"CUDA {cuda}" if cuda else "a CPU build") + f", {torch.get_num_threads()} threads",
    )


def _packages() -> Iterator[Finding]:
    """Compare installed versions with the stack's lock file."""
    stack = compat.stack()
    wrong, count = [], 0
    for name in (stack, f"{stack}-deepspeed"):
        path = ROOT / "env/locks" / f"{name}.txt"
        if not path.exists():
            yield Finding("packages", "warn", f"no {path.name} to compare with", "run from a checkout")
            return
        for package, version, marker in re.findall(
            r"^([\w.-]+)===?([^\s;]+)(?: ; (.*))? \\$", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            if marker and not Marker(marker).evaluate():
                continue
            count += 1
            try:
                installed = importlib.metadata.version(package).split("+")[0]
            except importlib.metadata.PackageNotFoundError:
                installed = "none"
            if installed != version:
                wrong.append(f"{package} {installed} (locked {version})")
    if not wrong:
        yield Finding("packages", "ok", f"all {count} match the lock file of the {stack} stack")
        return
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    yield Finding(
        "packages", "warn", f"{', '.join(wrong[:4])}{more}", f"make venv STACK={stack} installs the locked ones"
    )


def _gpus() -> Iterator[Finding]:
    driver = _driver()
    if driver:
        oldest, own = compat.drivers().get((torch.version.cuda or "").split(".")[0], (0, 0))
        major = int(driver.split(".")[0])
        status: Status = "fail" if major < oldest else "warn" if major < own else "ok"
        remedy = (
            f"CUDA {torch.version.cuda} needs driver {oldest} or later ({own} recommended): update the driver"
            if major < own
            else ""
        )
        yield Finding("driver", status, driver, remedy)
    if not torch.cuda.is_available():
        if not driver:
            yield Finding("GPU", "ok", "no NVIDIA driver: training runs on the CPU")
        elif torch.version.cuda is None:
            yield Finding("GPU", "fail", "there is a driver, but torch is a CPU build", "make venv")
        else:
            yield Finding(
                "GPU",
                "fail",
                "there is a driver, but torch sees no GPU",
                "check nvidia-smi and CUDA_VISIBLE_DEVICES; in a container, --gpus all",
            )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        archs = [int(arch[3:]) for arch in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", arch)]
        supported = any(arch // 10 == properties.major and arch % 10 <= properties.minor for arch in archs)
        remedy = f"torch {torch.__version__} has no kernels for it (only for {', '.join(map(str, archs))}): use the other stack (README)"
        yield Finding(f"GPU {index}", "ok" if supported else "fail", found, "" if supported else remedy)


def _driver() -> str:
    """The NVIDIA driver's version; empty if there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ""
    version = pynvml.nvmlSystemGetDriverVersion()
    pynvml.nvmlShutdown()
    return version if isinstance(version, str) else version.decode()


def _compilers() -> Iterator[Finding]:
    compiler = shutil.which("g++") or shutil.which("c++")
    built = build.why_unavailable() is None
    remedy = "" if compiler or built else f"sudo apt install g++, then {target('kernels')}"
    yield Finding(
        "C++ compiler",
        "ok" if compiler or built else "warn",
        compiler or "none" + ("; the kernels are compiled already" if built else ""),
        remedy,
    )
    # as in rwkv.kernels.build
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ninja = _version(shutil.which("ninja", path=path), "(.+)")
    missing = "none" + ("; the kernels are compiled already" if built else "")
    yield Finding(
        "ninja",
        "ok" if ninja or built else "warn",
        ninja or missing,
        "" if ninja or built else "run make venv to install it",
    )
    nvrtc = compat.nvrtc()
    yield Finding(
        "NVRTC",
        "ok",
        f"{nvrtc.name}; nvcc is not needed" if nvrtc else "none: only CPU kernels can be compiled",
    )
    nvcc, cuda = _version(shutil.which("nvcc"), r"release ([\d.]+)"), torch.version.cuda or "none"
    use = (
        "DeepSpeed can compile its own CUDA ops"
        if nvcc == cuda
        else f"not needed; DeepSpeed's own CUDA ops would need {cuda}"
    )
    yield Finding("nvcc", "ok", f"{nvcc}, {use}" if nvcc else "none: not needed")


def _version(program: str | None, pattern: str) -> str:
    """The version that `program --version` prints; empty if `program` is None."""
    if not program:
        return ""
    output = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(pattern, output)
    return found[1] if found else "unknown version"


def _kernels() -> Iterator[Finding]:
    """Check that each compiled WKV backend loads and matches the reference."""
    reason = load.why_unavailable()
    if reason:
        yield Finding(
            "WKV on the CPU",
            "warn",
            reason.split("; run:")[0],
            f"{target('kernels')}; without them training is about a thousand times slower",
        )
    else:
        yield _check_wkv("WKV on the CPU", torch.device("cpu"), torch.ops.rwkv.cpu_vectors(""))
    for index in range(torch.cuda.device_count()):
        name = f"WKV on GPU {index}"
        reason = load.why_unavailable_on(index)
        if reason:
            yield Finding(name, "fail", reason.split("; run:")[0], target("kernels"))
        else:
            device, code = torch.device("cuda", index), build.device_code(torch.cuda.get_device_capability(index))
            yield _check_wkv(name, device, code.name)
            yield _check_time_mix(f"time-mix on GPU {index}", device)


def _check_time_mix(name: str, device: torch.device) -> Finding:
    try:
        error = deviation.of_time_mix(device)
        found = f"RWKV-7's, {error:.0e} from the reference"
    except RuntimeError as failure:
        error, found = float("inf"), " ".join(str(failure).split())
    remedy = "" if error < _DEVIATION else "RWKV_FUSED=0 before a command avoids its CUDA kernels; please report it"
    return Finding(name, "fail" if remedy else "ok", found, remedy)


def _check_wkv(name: str, device: torch.device, found: str) -> Finding:
    error = deviation.of_wkv(device)
    if error < _DEVIATION:
        return Finding(name, "ok", f"{found}, within {error:.0e} of the reference")
    return Finding(
        name,
        "fail",
        f"{found}, differs from the reference by {error:.0e}",
        f"rm -r rwkv/kernels/lib and {target('kernels')}; if it persists, please report it",
    )


def _deepspeed() -> Iterator[Finding]:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module("deepspeed")
            ops = compat.deepspeed_ops()
    except Exception as error:  # an import can raise anything, and DeepSpeed is optional
        yield Finding(
            "DeepSpeed",
            "warn",
            f"cannot be imported ({type(error).__name__}: {error})",
            "make venv; without it, training works with the other strategies",
        )
        return
    found = f"{importlib.metadata.version('deepspeed')}, compiled ops: {', '.join(ops) or 'none (torch has a fused Adam)'}; no compiler is needed to train with it"
    if broken := [f"{name} does not load ({reason})" for name, reason in ops.items() if reason]:
        yield Finding(
            "DeepSpeed",
            "warn",
            f"{found}; {', '.join(broken)}",
            "install the missing CUDA library; until then torch's Adam is used",
        )
    else:
        yield Finding("DeepSpeed", "ok", found)


def _shared_memory() -> Iterator[Finding]:
    path = Path("/dev/shm")
    if not path.exists():
        yield Finding(
            "shared memory", "warn", "no /dev/shm", "training on several GPUs needs it (NCCL): mount a tmpfs there"
        )
        return
    size = shutil.disk_usage(path).total
    small = size < GIB
    yield _warn_if(small, "shared memory", f"{size / GIB:.1f} GiB", "in a container: --ipc=host or --shm-size=8g")


def _memory() -> Iterator[Finding]:
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, free = (int(values[name]) * 1024 / GIB for name in ("MemTotal", "MemAvailable"))
    low = free < 4
    yield _warn_if(
        low,
        "memory",
        f"{free:.1f} of {total:.1f} GiB available",
        "a 0.4b model takes 4 GiB to load: close other programs",
    )


def _entropy() -> Iterator[Finding]:
    path = Path("/proc/sys/kernel/random/entropy_avail")
    if path.exists():
        bits = int(path.read_text())
        low = bits < 200
        yield _warn_if(low, "entropy", f"{bits} bits", "seeding may block at start-up: sudo apt install haveged")


def _disk(folder: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(_existing(folder)).free / GIB
    low = free < 10
    yield _warn_if(low, "disk", f"{free:.0f} GiB free", "a checkpoint of a 1.5b model is 3 to 6 GiB: free some space")


def _writable(folder: Path) -> Iterator[Finding]:
    places = {
        "run folder": folder,
        "temporary files": Path(tempfile.gettempdir()),
        "caches": Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")),
    }
    unwritable = [f"{what} ({place})" for what, place in places.items() if not _can_write(place)]
    remedy = f"give user {os.getuid()} write access (chown), or set another folder, TMPDIR or XDG_CACHE_HOME"
    yield Finding(
        "writable",
        "fail" if unwritable else "ok",
        f"no write access to {', '.join(unwritable)}" if unwritable else ", ".join(places),
        remedy if unwritable else "",
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest parent that exists already."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _can_write(place: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=_existing(place)):
            return True
    except OSError:
        return False
