"""Compile the units of cuda/ ahead of time (`make kernels`), and say whether what is there is current.

In rwkv/kernels/lib/torch-<version>/: wkv4.so, the host extension with the CPU unit and the launcher; wkv4_sm_<arch>.cubin for every GPU
architecture and wkv4_compute_<newest>.ptx, the CUDA unit; manifest.json, written last.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rwkv import compat
from rwkv.commands import target
from rwkv.files import whole, write_json
from rwkv.kernels import nvrtc

SOURCES = Path(__file__).parents[2] / "cuda"
# -fopenmp is for at::parallel_for; it is not passed to the linker: the symbols come from the OpenMP that torch has loaded, so that
# there is one pool of threads and not two. Widths are chosen file by file and at run time, so nothing here names a processor.
HOST_OPTIONS = ["-O3", "-fopenmp", "-std=c++17", "-Wno-psabi", "-Wno-unknown-pragmas"]
DEVICE_OPTIONS = ["--std=c++17", "--ptxas-options=-v"]
NO_NVRTC = f"this environment has no NVRTC for torch's CUDA ({torch.version.cuda or 'none: a CPU build'})"


def folder() -> Path:
    """Where the compiled units lie: one per torch version, as its ABI differs."""
    return Path(__file__).parent / "lib" / f"torch-{torch.__version__}"


def library() -> Path:
    """The host extension."""
    return folder() / "wkv4.so"


def device_sources() -> tuple[Path, list[Path]]:
    """What NVRTC compiles, and what that includes."""
    unit = SOURCES / "gpu.cu"
    return unit, [path for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cu") and path != unit]


def source_hash() -> str:
    """SHA-256 over the kernels' sources and compile options."""
    digest = hashlib.sha256("\0".join(HOST_OPTIONS + DEVICE_OPTIONS).encode())
    for path in sorted(p for p in SOURCES.iterdir() if p.suffix in (".h", ".cpp", ".cu")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def manifest() -> dict:
    """What `make kernels` wrote down; empty if it has not run to its end for this torch."""
    try:
        return json.loads((folder() / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def stamp() -> int:
    """When `make kernels` last ran to its end for this torch, in nanoseconds; 0 if never."""
    try:
        return (folder() / "manifest.json").stat().st_mtime_ns
    except OSError:
        return 0


def why_unavailable() -> str | None:
    """Why the compiled units cannot be loaded, as a sentence with a remedy; None if they can."""
    written = manifest()
    if "source_hash" not in written:
        return f"it is not compiled for torch {torch.__version__}; run: {target('kernels')}"
    if SOURCES.is_dir() and written["source_hash"] != source_hash():
        return f"it was compiled from other sources (hash {written['source_hash'][:12]}, now {source_hash()[:12]}); run: {target('kernels')}"
    for name, size in written.get("sizes", {}).items():
        path = folder() / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{path} is {f'not of {size} bytes' if path.is_file() else 'gone'}; run: {target('kernels')}"
    return None


def device_code(capability: tuple[int, int]) -> Path:
    """The file for a GPU of this compute capability: the cubin of the same major and the highest minor that is not above the GPU's;
    else the PTX, if the GPU is newer than it.

    Raises:
        LookupError: none fits; the message says what there is and what to do.
    """
    major, minor = capability
    files = manifest().get("device", {}).get("files", {})
    archs = {int(name.split("_sm_")[1].split(".")[0]): name for name in files if name.endswith(".cubin")}
    fitting = [arch for arch in archs if arch // 10 == major and arch % 10 <= minor]
    if fitting:
        return folder() / archs[max(fitting)]
    for name in files:
        if name.endswith(".ptx") and int(name.split("_compute_")[1].split(".")[0]) <= 10 * major + minor:
            return folder() / name
    if not archs:
        raise LookupError(
            f"the CUDA unit is not compiled, as {NO_NVRTC}; take an environment with both (make venv), then make kernels"
        )
    have = ", ".join(f"{arch // 10}.{arch % 10}" for arch in sorted(archs))
    raise LookupError(
        f"the GPU has compute capability {major}.{minor} and the CUDA unit is compiled for {have}; take the stack that drives this GPU: make venv STACK=modern for newer ones, cu117 for older"
    )


def build() -> None:
    """Compile both units: the host's with g++ and ninja, the device's with NVRTC. Raises SystemExit with a remedy if there is no compiler."""
    if shutil.which("g++") is None and shutil.which("c++") is None:
        raise SystemExit(
            "make kernels: no C++ compiler found. Install one (Ubuntu, Debian: sudo apt install g++; conda: conda install gxx) and run"
            " make kernels again. Without it training uses the reference loop, correct but a thousand times slower."
        )
    folder().mkdir(parents=True, exist_ok=True)
    with open(folder() / ".lock", "w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # another build may be under way: wait for it, then there is nothing left to do
        if not usable():
            _build()


def usable() -> bool:
    """Whether everything is there, current, and loads in a new process."""
    if why_unavailable() is not None:
        return False
    loads = f"import torch; torch.ops.load_library({str(library())!r})"
    return subprocess.run([sys.executable, "-c", loads], capture_output=True, check=False).returncode == 0


def _build() -> None:
    (folder() / "manifest.json").unlink(
        missing_ok=True
    )  # first: a build that is broken off leaves nothing that looks usable
    for old in folder().glob("wkv4*"):
        old.unlink()
    before = time.time()
    with ThreadPoolExecutor(1) as beside:
        compiled = beside.submit(_build_device)
        _build_host()
        device = compiled.result()
    written = {
        "source_hash": source_hash(),
        "torch": torch.__version__,
        "sizes": {path.name: path.stat().st_size for path in sorted(folder().glob("wkv4*"))},
        "host": {"file": library().name, "options": HOST_OPTIONS},
        "device": device,
    }
    write_json(folder() / "manifest.json", written)
    made = f"{device['compiler']} for {', '.join(device['files'])}" if device else f"no CUDA unit, as {NO_NVRTC}"
    print(f"kernels: {library()}; {made}; {time.time() - before:.0f} s")


def _build_host() -> None:
    cpp_extension = compat.cpp_extension()
    # torch asks PATH for ninja; ours lies beside this Python, whose environment need not be activated
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if any(" " in path for path in cpp_extension.include_paths()):
        raise SystemExit(
            f"make kernels: torch lies in {torch.__path__[0]}, and its compiler commands do not allow for a space in that path; move the"
            " environment, for example with make venv VENV=/some/where"
        )
    with tempfile.TemporaryDirectory() as build_folder:
        sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
        cpp_extension.load(
            library().stem,
            sources,
            extra_cflags=HOST_OPTIONS,
            extra_ldflags=["-ldl"],
            build_directory=build_folder,
            is_python_module=False,
        )
        with whole(library()) as temporary:
            shutil.copyfile(Path(build_folder) / library().name, temporary)


def _build_device() -> dict:
    path = compat.nvrtc()
    if path is None:
        return {}
    compiler = nvrtc.Compiler(path)
    archs = compat.gpu_archs(compiler.version, compiler.archs)
    targets = [f"sm_{arch}" for arch in reversed(archs)] + [f"compute_{archs[-1]}"]  # what takes longest first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = pool.map(lambda target: _compile(compiler, target), targets)
    return {
        "compiler": f"NVRTC {compiler.version}",
        "options": DEVICE_OPTIONS,
        "files": dict(files),
    }


def _compile(compiler: nvrtc.Compiler, target: str) -> tuple[str, dict]:
    """Write the cubin or PTX for a target; its name, and the registers and spills of its kernels."""
    options = DEVICE_OPTIONS if target.startswith("sm_") else DEVICE_OPTIONS[:1]
    image, log = compiler.compile(*device_sources(), target, options)
    if "warning" in log:
        print(f"make kernels: {target}:\n{log}")
    name = f"wkv4_{target}.{'cubin' if target.startswith('sm_') else 'ptx'}"
    with whole(folder() / name) as temporary:
        temporary.write_bytes(image)
    return name, nvrtc.resources(log)


def main() -> None:
    """Build unless everything is there, current and loads."""
    if usable():
        print(f"kernels: {library()} is current")
    else:
        build()
