"""NVRTC, the CUDA compiler in torch's wheels: needs no nvcc, CUDA toolkit or GPU."""

import ctypes
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# ctypes instead of cuda-python, whose releases for CUDA 11.7 need Cython and a toolkit to build.


class Compiler:
    """One NVRTC library.

    Attributes:
        version: such as "11.7".
        archs: supported compute capabilities, ascending (86 is 8.6).
    """

    def __init__(self, path: Path):
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # CUDA 13 finds it by name only
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._nvrtc = ctypes.CDLL(str(path))
        self._nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = (ctypes.c_int() for _ in range(3))
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", archs)
        self.archs = sorted(archs)

    def compile(self, source: Path, headers: Mapping[str, Path], target: str, options: list[str]) -> tuple[bytes, str]:
        """Compile for a target: "sm_86" gives a cubin, "compute_86" PTX.

        Args:
            source: the file to compile.
            headers: {include path: file}.
            target: the compiler target.
            options: further compiler options.

        Returns:
            The cubin or PTX, and the compiler's log.

        Raises:
            RuntimeError: the source does not compile; the message is the compiler's log.
        """
        program = ctypes.c_void_p()
        texts, names = [path.read_bytes() for path in headers.values()], [name.encode() for name in headers]
        array = ctypes.c_char_p * len(headers)
        self._call(
            "CreateProgram",
            ctypes.byref(program),
            source.read_bytes(),
            source.name.encode(),
            len(headers),
            array(*texts),
            array(*names),
        )
        try:
            flags = [option.encode() for option in (f"--gpu-architecture={target}", *options)]
            # NVRTC 11.7 sets the C locale in its thread, where Python would read and write ASCII:
            # use another thread
            with ThreadPoolExecutor(1) as thread:
                code = thread.submit(
                    self._nvrtc.nvrtcCompileProgram, program, len(flags), (ctypes.c_char_p * len(flags))(*flags)
                ).result()
            log = self._text(program, "ProgramLog").rstrip(b"\0").decode()
            if code:
                raise RuntimeError(f"NVRTC {self.version}, {source.name} for {target}:\n{log}")
            return self._text(program, "CUBIN" if target.startswith("sm_") else "PTX"), log
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments) -> None:
        code = getattr(self._nvrtc, f"nvrtc{name}")(*arguments)
        if code:
            raise RuntimeError(f"nvrtc{name}: {self._nvrtc.nvrtcGetErrorString(code).decode()}")


def resources(log: str) -> dict[str, dict[str, int]]:
    """{kernel: registers per thread, and bytes of stack and spills} from a `ptxas -v` log."""
    kernels: dict[str, dict[str, int]] = {}
    for block in re.split(r"(?=Compiling entry function)", log)[1:]:
        name = re.findall(r"entry function '(\w+)'", block)[0]
        numbers = {
            "registers": r"Used (\d+) registers",
            "stack": r"(\d+) bytes stack frame",
            "spill_stores": r"(\d+) bytes spill stores",
            "spill_loads": r"(\d+) bytes spill loads",
        }
        kernels[name] = {key: int(re.findall(pattern, block)[0]) for key, pattern in numbers.items()}
    return kernels
