"""Compile the WKV units ahead of time (`make kernels`), and say whether what is there is current."""

import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch

from rwkv import compat
from rwkv.files import whole, write_json

SOURCES = Path(__file__).parents[2] / "cuda"
UNITS = ["wkv4_cpu.cpp"]
# -ffast-math lets the compiler use libmvec and if-convert; it is not passed to the linker, where it would change the
# process's treatment of denormals. -fopenmp likewise only compiles: the symbols come from the OpenMP that torch has loaded,
# so that there is one pool of threads and not two.
OPTIONS = ["-O3", "-ffast-math", "-fopenmp", "-std=c++17", "-Wno-unknown-pragmas"]


def library() -> Path:
    """Where the compiled CPU unit lies: one per torch version, as its ABI differs."""
    return Path(__file__).parent / "lib" / f"torch-{torch.__version__}" / "wkv4_cpu.so"


def source_hash() -> str:
    """SHA-256 over the kernel's sources and compile options."""
    digest = hashlib.sha256("\0".join(OPTIONS).encode())
    for path in sorted(p for p in SOURCES.iterdir() if p.suffix in (".h", ".cpp")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def refusal() -> str | None:
    """Why the compiled unit cannot be loaded, as a sentence with a remedy; None if it can."""
    path = library()
    try:
        built = json.loads(path.with_suffix(".json").read_text())["source_hash"]
    except FileNotFoundError:
        return f"it is not compiled for torch {torch.__version__}; run: make kernels"
    if SOURCES.is_dir() and built != source_hash():
        return f"it was compiled from other sources (hash {built[:12]}, now {source_hash()[:12]}); run: make kernels"
    return None


def build() -> Path:
    """Compile with g++ and ninja, through torch's C++ extension builder. Raises SystemExit with a remedy if there is no compiler."""
    cpp_extension = compat.cpp_extension()
    if shutil.which("g++") is None and shutil.which("c++") is None:
        raise SystemExit(
            "make kernels: no C++ compiler found. Install one (Ubuntu, Debian: sudo apt install g++; conda: conda install gxx) and run"
            " make kernels again. Without it training uses the reference loop, correct but a hundred times slower."
        )
    path = library()
    path.parent.mkdir(parents=True, exist_ok=True)
    before = time.time()
    with tempfile.TemporaryDirectory() as folder:
        cpp_extension.load(
            path.stem, [str(SOURCES / unit) for unit in UNITS], extra_cflags=OPTIONS, build_directory=folder, is_python_module=False
        )
        with whole(path) as temporary:
            shutil.copyfile(Path(folder) / path.name, temporary)
    write_json(path.with_suffix(".json"), {"source_hash": source_hash(), "torch": torch.__version__, "options": OPTIONS})
    print(f"kernels: {path} compiled in {time.time() - before:.0f} s")
    return path


def main() -> None:
    """Build unless what is there is current."""
    if refusal() is None:
        print(f"kernels: {library()} is current")
    else:
        build()
