"""Compile the kernels in cuda/ ahead of time (`make kernels`), and check whether they are current.

Output in rwkv/kernels/lib/torch-<version>/: rwkv.so, the host library with the CPU kernels and the
launcher; rwkv_sm_<arch>.cubin for the GPUs of this machine; manifest.json, written last. With
RWKV_KERNELS_ALL=1 (`make kernels ALL=1`) also cubins for every architecture of the stack, and PTX
for newer GPUs.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rwkv import compat
from rwkv.commands import target
from rwkv.files import atomic_write, write_json
from rwkv.kernels import nvrtc

SOURCES = Path(__file__).parents[2] / "cuda"
# -fopenmp is for at::parallel_for. It is not passed to the linker: the symbols come from the OpenMP
# library that torch has loaded, so there is only one thread pool. Vector widths are set per source
# file.
HOST_OPTIONS = ["-O3", "-fopenmp", "-std=c++17", "-Wno-psabi", "-Wno-unknown-pragmas"]
DEVICE_OPTIONS = ["--std=c++17", "--ptxas-options=-v"]
NO_NVRTC = f"this environment has no NVRTC for torch's CUDA ({torch.version.cuda or 'none: a CPU build'})"


def folder() -> Path:
    """The folder of the compiled kernels: one per torch version, as ABIs differ."""
    return Path(__file__).parent / "lib" / f"torch-{torch.__version__}"


def library() -> Path:
    """The host library."""
    return folder() / "rwkv.so"


def sources(*suffixes: str) -> dict[str, Path]:
    """The sources with these suffixes: {path below cuda/, as used in #include: file}."""
    files = sorted(path for path in SOURCES.rglob("*.*") if path.suffix in suffixes)
    return {path.relative_to(SOURCES).as_posix(): path for path in files}


def device_sources() -> tuple[Path, dict[str, Path]]:
    """The file that NVRTC compiles, and {include path: file} of its headers."""
    return SOURCES / "common" / "gpu.cu", sources(".h", ".cu")


def source_hash() -> str:
    """SHA-256 over the kernels' sources and compile options."""
    digest = hashlib.sha256("\0".join(HOST_OPTIONS + DEVICE_OPTIONS).encode())
    for name, path in sources(".h", ".cpp", ".cu").items():
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def manifest() -> dict:
    """The manifest of the last complete build for this torch; empty if there is none."""
    try:
        return json.loads((folder() / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def build_time_ns() -> int:
    """The time of the last complete build for this torch, in ns; 0 if there is none."""
    try:
        return (folder() / "manifest.json").stat().st_mtime_ns
    except OSError:
        return 0


def why_unavailable() -> str | None:
    """Why the host library is unavailable, and what to do; None if it is available."""
    built = manifest()
    if "source_hash" not in built:
        return f"not compiled for torch {torch.__version__}; run: {target('kernels')}"
    if SOURCES.is_dir() and built["source_hash"] != source_hash():
        hashes = f"{built['source_hash'][:12]}, now {source_hash()[:12]}"
        return f"compiled from other sources (hash {hashes}); run: {target('kernels')}"
    for name, size in built.get("sizes", {}).items():
        path = folder() / name
        if not path.is_file():
            return f"{path} is missing; run: {target('kernels')}"
        if path.stat().st_size != size:
            return f"{path} is not {size} bytes long; run: {target('kernels')}"
    return None


def device_code(capability: tuple[int, int]) -> Path:
    """The cubin for a GPU of this compute capability, or the PTX for a newer GPU.

    Raises:
        LookupError: there is none; the message has a remedy.
    """
    names = manifest().get("device", {}).get("files", {})
    name = _best(capability, names)
    if name is not None:
        return folder() / name
    major, minor = capability
    if compat.nvrtc() is None:
        raise LookupError(f"the CUDA kernels are not compiled: {NO_NVRTC}; run: make venv, then make kernels")
    compiled = ", ".join(f"{arch // 10}.{arch % 10}" for arch in _archs(names)) or "no GPU"
    problem = f"the GPU has compute capability {major}.{minor} and the CUDA kernels are compiled for {compiled}"
    if _best(capability, _targets(all_archs())) is None:
        raise LookupError(
            f"{problem}; use the other stack: make venv STACK=modern for newer GPUs, cu117 for older ones"
        )
    raise LookupError(f"{problem}; run: {target('kernels')}")


def _best(capability: tuple[int, int], names: Iterable[str]) -> str | None:
    """The best of `names`, compiler targets or file names, for a GPU; None if none fits.

    That is the cubin with the GPU's major version and the highest minor version not above the
    GPU's, else the PTX of an older architecture.
    """
    major, minor = capability
    names = list(names)
    fitting = [arch for arch in _archs(names) if arch // 10 == major and arch % 10 <= minor]
    if fitting:
        return next(name for name in names if f"sm_{max(fitting)}" == name.split(".")[0].removeprefix("rwkv_"))
    ptx = {int(name.split("compute_")[1].split(".")[0]): name for name in names if "compute_" in name}
    return next((name for arch, name in ptx.items() if arch <= 10 * major + minor), None)


def _archs(names: Iterable[str]) -> list[int]:
    return sorted(int(name.split("sm_")[1].split(".")[0]) for name in names if "sm_" in name)


def all_archs() -> list[int]:
    """Every architecture of the stack (86 is compute capability 8.6); empty without NVRTC."""
    path = compat.nvrtc()
    if path is None:
        return []
    compiler = nvrtc.Compiler(path)
    return compat.gpu_archs(compiler.version, compiler.archs)


def _targets(archs: list[int]) -> list[str]:
    """Compiler targets: sm_ for each architecture, slowest first, and compute_ for the newest."""
    return [f"sm_{arch}" for arch in reversed(archs)] + [f"compute_{arch}" for arch in archs[-1:]]


def needed_targets() -> list[str]:
    """The compiler targets for the GPUs of this machine, or all (RWKV_KERNELS_ALL=1)."""
    targets = _targets(all_archs())
    if os.environ.get("RWKV_KERNELS_ALL") == "1":
        return targets
    found = {_best(torch.cuda.get_device_capability(i), targets) for i in range(torch.cuda.device_count())}
    return [name for name in targets if name in found]


def build() -> None:
    """Compile for the host with g++ and ninja, and for GPUs with NVRTC.

    Raises:
        SystemExit: there is no compiler; the message has a remedy.
    """
    if shutil.which("g++") is None and shutil.which("c++") is None:
        raise SystemExit(
            "make kernels: no C++ compiler found. Install one (Ubuntu, Debian: sudo apt install g++; conda: conda"
            " install gxx) and run make kernels again. Without it training uses the reference loop, which is correct"
            " but about a thousand times slower."
        )
    folder().mkdir(parents=True, exist_ok=True)
    with open(folder() / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # if another process is building, wait; then nothing is left to do
        if not usable():
            _build()


def usable() -> bool:
    """Whether all files that this machine needs exist, are current, and load in a new process."""
    if why_unavailable() is not None:
        return False
    files = manifest().get("device", {}).get("files", {})
    if not {_file_name(name) for name in needed_targets()} <= set(files):
        return False
    program = f"import torch; torch.ops.load_library({str(library())!r})"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def _build() -> None:
    (folder() / "manifest.json").unlink(missing_ok=True)  # first, so that an interrupted build is not used
    for old in folder().glob("rwkv*"):
        old.unlink()
    started, compiled_from = time.time(), source_hash()  # before, as the sources may change meanwhile
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(_build_device)
        _build_host()
        device = compiled.result()
    manifest_entries = {
        "source_hash": compiled_from,
        "torch": torch.__version__,
        "sizes": {path.name: path.stat().st_size for path in sorted(folder().glob("rwkv*"))},
        "host": {"file": library().name, "options": HOST_OPTIONS},
        "device": device,
    }
    write_json(folder() / "manifest.json", manifest_entries)
    if not device:
        gpus = f"no CUDA kernels: {NO_NVRTC}"
    elif not device["files"]:
        gpus = "no CUDA kernels: no GPU found (ALL=1 compiles for every GPU of the stack)"
    else:
        gpus = f"{device['compiler']} for {', '.join(device['files'])}"
    print(f"kernels: {library()}; {gpus}; {time.time() - started:.0f} s")


def _build_host() -> None:
    cpp_extension = compat.cpp_extension()
    # torch looks for ninja on PATH; ours is next to this Python, whose environment may be inactive
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if any(" " in path for path in cpp_extension.include_paths()):
        raise SystemExit(
            f"make kernels: torch is in {torch.__path__[0]}, and its compiler commands do not support spaces in that path;"
            " move the environment, for example with make venv VENV=/some/where"
        )
    with tempfile.TemporaryDirectory() as build_folder:
        cpp_extension.load(
            library().stem,
            [str(path) for path in sources(".cpp").values()],
            extra_include_paths=[str(SOURCES)],
            extra_cflags=HOST_OPTIONS,
            extra_ldflags=["-ldl"],
            build_directory=build_folder,
            is_python_module=False,
        )
        with atomic_write(library()) as temporary:
            shutil.copyfile(Path(build_folder) / library().name, temporary)


def _build_device() -> dict:
    path = compat.nvrtc()
    if path is None:
        return {}
    compiler = nvrtc.Compiler(path)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = pool.map(lambda name: _compile(compiler, name), needed_targets())
    return {"compiler": f"NVRTC {compiler.version}", "options": DEVICE_OPTIONS, "files": dict(files)}


def _file_name(name: str) -> str:
    return f"rwkv_{name}.{'cubin' if name.startswith('sm_') else 'ptx'}"


def _compile(compiler: nvrtc.Compiler, name: str) -> tuple[str, dict]:
    """Write the cubin or PTX for a target. Returns its file name and the kernels' resources."""
    options = DEVICE_OPTIONS if name.startswith("sm_") else DEVICE_OPTIONS[:1]
    image, log = compiler.compile(*device_sources(), name, options)
    if "warning" in log:
        print(f"make kernels: {name}:\n{log}")
    with atomic_write(folder() / _file_name(name)) as temporary:
        temporary.write_bytes(image)
    return _file_name(name), nvrtc.resources(log)


def main() -> None:
    """Build, unless everything that this machine needs is built and current."""
    if usable():
        print(f"kernels: {library()} is current")
    else:
        build()
