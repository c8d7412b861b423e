"""Malicious files: executing anything in them would create a file named `ran` in the working
directory; others block or exhaust memory.
"""

import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import torch

MARKER = "ran"

# functions that a pickle may name, with arguments that would create the marker or load more code
CALLS = {
    "os system": (f"touch {MARKER}",),
    "posix system": (f"touch {MARKER}",),
    "subprocess check_call": (["touch", MARKER],),
    "builtins exec": (f"open('{MARKER}', 'w')",),
    "builtins eval": (f"open('{MARKER}', 'w')",),
    "__builtin__ eval": (f"open('{MARKER}', 'w')",),
    "builtins getattr": ("", "upper"),
    "builtins __import__": ("antigravity",),
    "builtins open": (MARKER, "w"),
    "io open": (MARKER, "w"),
    "_io FileIO": (MARKER, "w"),
    "functools partial": (print,),
    "operator attrgetter": ("upper",),
    "importlib import_module": ("antigravity",),
    "runpy run_path": ("x.py",),
    "torch load": ("inner.pth",),
    "torch.jit load": ("inner.pth",),
    "torch.jit._serialization load": ("inner.pth",),
    "torch.hub load": (".", "f"),
    "torch.hub load_state_dict_from_url": ("file:///x",),
    "torch.utils.cpp_extension load_inline": ("x", ""),
    "torch from_file": (MARKER, True, 4),
    "torch._C _load_from_bytes": (b"",),
    "torch.storage _load_from_bytes": (b"",),
    "torch.storage UntypedStorage.from_file": (MARKER, True, 4),
    "torch FloatStorage.from_file": (MARKER, True, 4),
    "torch._utils _rebuild_wrapper_subclass": (),
    "torch._utils _import_dotted_name": ("os.system",),
    "torch.fx.graph_module reduce_graph_module": ({}, ""),
    "numpy.core.multiarray _reconstruct": (),
    "numpy load": ("x.npy",),
    "numpy.testing._private.utils runstring": (f"open('{MARKER}', 'w')", {}),
    "collections OrderedDict.fromkeys": ([],),
    "collections.OrderedDict __reduce__": (),
    "copyreg _reconstructor": (object, object, None),
    "types FunctionType": (),
    "codecs encode": ("", "latin1"),
    "pickle loads": (b"N.",),
    "torch Tensor.share_memory_": (),
    "__main__ Model": (),
    "rwkv.checkpoint read_tensors": ("inner.pth",),
}


def _pushed(*values: object) -> bytes:
    """Opcodes that push a tuple of plain values; a function is pushed by its name."""
    return pickle.dumps(values, 2)[2:-1]


def call(name: str, arguments: tuple, protocol: int = 2) -> bytes:
    """A pickle that calls a function named `module attribute`."""
    module, attribute = name.split(" ")
    if protocol == 2:
        named = f"c{module}\n{attribute}\n".encode()
    else:
        named = b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, attribute)) + b"\x93"
    return b"\x80" + bytes([protocol]) + named + _pushed(*arguments) + b"R."


def other_instructions() -> dict[str, bytes]:
    """Pickles that execute something by other opcodes than GLOBAL and REDUCE."""
    text = f"touch {MARKER}".encode()
    path = pickle.dumps(Path(MARKER), 2)[2:-1]
    return {
        "INST": b"(S'" + text + b"'\nios\nsystem\n.",
        "OBJ": b"\x80\x02(cos\nsystem\nX" + struct.pack("<I", len(text)) + text + b"o.",
        "NEWOBJ": b"\x80\x02c_io\nFileIO\n" + _pushed(MARKER, "w") + b"\x81.",
        "NEWOBJ of an allowed name": b"\x80\x02ctorch\nFloatStorage\n)\x81.",
        "NEWOBJ_EX": b"\x80\x04c_io\nFileIO\n" + _pushed(MARKER, "w") + b"}\x92.",
        "EXT1": b"\x80\x02\x82\x01.",
        "a Path, then its method": b"\x80\x02" + path + b".",
        "BUILD of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__Nsb.",
        "BUILD of a list": b"\x80\x02]}b.",
        "REDUCE of a type that is only passed": b"\x80\x02ctorch\nTensor\n)R.",
        "REDUCE of a storage type": b"\x80\x02ctorch\nFloatStorage\n(K\x04tR.",
        "REDUCE of a dtype": b"\x80\x02ctorch\nfloat32\n)R.",
        "REDUCE of a dictionary": b"\x80\x02})R.",
        "a persistent id of a module": b"\x80\x02(X\x06\x00\x00\x00moduleX\x01\x00\x00\x00xX\x01\x00\x00\x00yX\x01\x00\x00\x00ztQ.",
        "a rebuilt type within itself": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00ctorch\nTensor\nq\x01)}t"
        + b"(h\x00h\x01" * 3000
        + b")}t" * 3000
        + b"R.",
    }


def archive(pickled: bytes, records: dict[str, bytes] | None = None, top: str = "archive") -> bytes:
    """A zip archive like torch.save's with this data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in {"data.pkl": pickled, "version": b"3\n", **(records or {})}.items():
            file.writestr(f"{top}/{name}", data)
    return buffer.getvalue()


def legacy(pickled: bytes, place: int) -> bytes:
    """A file of torch before 1.6 with this pickle as one of its five."""
    parts = [
        pickle.dumps(x, 2)
        for x in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}, {}, [])
    ]
    parts[place] = pickled
    return b"".join(parts)


class _Script(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = 1

    @torch.jit.export
    def __getstate__(self) -> int:
        return self.x

    @torch.jit.export
    def __setstate__(self, state: int) -> None:
        self.x = state + torch.from_file("ran", True, 1).numel()  # creates the file
        self.training = False

    def forward(self) -> int:
        return self.x


def scripts(folder: Path) -> list[Path]:
    """TorchScript archives whose __setstate__ creates the marker, as written by torch.jit.save, and
    modified to confuse parsers.
    """
    plain = folder / "script.pth"
    torch.jit.script(_Script()).save(str(plain))
    data = plain.read_bytes()
    end = data.rfind(b"PK\x05\x06")
    locator = data.rfind(b"PK\x06\x07")
    variants = {
        "two_disks.pth": data[: locator + 16] + struct.pack("<I", 2) + data[end:],
        "behind.pth": b"#" * 64 + data,
        "comment.pth": data[:-2] + b"\x04\x00junk",
        "behind_tensors.pth": archive(pickle.dumps({}, 2)) + data,
    }
    renamed = io.BytesIO()
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(renamed, "w") as new:
        for record in old.infolist():
            new.writestr(record.filename.replace("script/", "x/y/"), old.read(record))
    variants["deeper.pth"] = renamed.getvalue()
    for name, content in variants.items():
        (folder / name).write_bytes(content)
    return [plain, *(folder / name for name in variants)]


def tar(folder: Path) -> Path:
    """A tar file of torch before 0.1.10 whose member `storages` is a hard link to another file,
    `victim`.
    """
    path = folder / "link.pth"
    with tarfile.open(path, "w") as file:
        for name in ("pickle", "tensors", "storages"):
            member = tarfile.TarInfo(name)
            if name == "storages":
                member.type, member.linkname, member.mode, member.mtime = (
                    tarfile.LNKTYPE,
                    str(folder / "victim"),
                    0o4777,
                    0,
                )
            file.addfile(member)
    return path


def tensor(
    shape: tuple,
    stride: tuple,
    count: int,
    storage: str = "FloatStorage",
    function: str = "_rebuild_tensor_v2",
    more: bytes = b"",
) -> bytes:
    """Opcodes that push a tensor in storage `0`."""
    return (
        f"ctorch._utils\n{function}\n((X\x07\x00\x00\x00storagectorch\n{storage}\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu".encode()
        + pickle.dumps(count, 2)[2:-1]
        + b"tQK\x00"
        + _pushed(*shape)
        + _pushed(*stride)
        + b"\x89ccollections\nOrderedDict\n)R"
        + more
        + b"tR"
    )


def dictionary(key: str, pushed: bytes) -> bytes:
    """A pickle of {key: what the opcodes push}."""
    return b"\x80\x02}X" + struct.pack("<I", len(key)) + key.encode() + pushed + b"s."


def fifo(folder: Path) -> Path:
    """A named pipe without a writer: opening it would block."""
    os.mkfifo(folder / "pipe.pth")
    return folder / "pipe.pth"
