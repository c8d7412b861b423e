"""An unpickler that can only build plain data and descriptions of tensors.

A pickle is a program for a stack machine that can import and call anything. This unpickler imports
nothing: names (GLOBAL) are looked up in `_NAMES`, an allow-list of our own functions, and any other
name is an error. BUILD, which sets attributes, is accepted only for OrderedDicts and parameters,
and ignored. Opcodes that torch.save does not write are errors.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rwkv.errors import FileFormatError, printable

DTYPES = {  # of storages
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128", "QInt8Storage": "qint8", "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
}  # fmt: skip
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex32": 4,
    "complex64": 8, "complex128": 16, "uint16": 2, "uint32": 4, "uint64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1, "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1,
}  # fmt: skip
_MAX_SIZE = 1 << 62  # of bytes or elements; torch uses signed 64-bit integers


class Forbidden(FileFormatError):
    """The pickle refers to something that is neither plain data nor a tensor. `name`: its
    module.attribute.
    """

    def __init__(self, name: str):
        self.name = name
        super().__init__(
            f"it contains {printable(name)!s:.200}, which is neither a tensor nor plain data, and is not loaded"
        )


@dataclass(frozen=True)
class StorageSpec:
    """A storage of one or several tensors: its key in the file, dtype ("" if untyped) and number of
    elements.
    """

    key: str
    dtype: str
    count: int
    view: int = 0  # elements to skip, in files of torch before 0.4

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * ITEM_BYTES[self.dtype or "uint8"]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor in a storage; offset and strides are in elements.

    `kind` is the reason if it is unusable (sparse, quantised, …); it then has no storage.
    """

    storage: StorageSpec | None
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    kind: str = ""


class _Dict(dict):
    """An OrderedDict, whose attributes (a state_dict's _metadata) are ignored."""


@dataclass(frozen=True)
class _Name:
    """An allowed name. `call` is what calling it does; without it the name can only be passed as an
    argument.
    """

    name: str
    call: Callable[..., Any] | None = None


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class DType:
    """A torch.dtype, by its name without `torch.`."""

    name: str


def _integers(value: Any, what: str) -> tuple[int, ...]:
    if (
        not isinstance(value, list | tuple)
        or len(value) > 64
        or not all(type(x) is int and 0 <= x < _MAX_SIZE for x in value)
    ):
        raise FileFormatError(f"it has a tensor with an impossible {what}")
    return tuple(value)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any = None, _hooks: Any = None, metadata: Any = None
) -> TensorSpec:
    if type(storage) is not StorageSpec:
        raise FileFormatError("it has a tensor without a storage")
    return _in_storage(storage, storage.dtype or "uint8", offset, size, stride, metadata)


def _typed_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> TensorSpec:
    if type(storage) is not StorageSpec or type(dtype) is not DType:
        raise FileFormatError("it has a tensor without a storage or dtype")
    return _in_storage(storage, dtype.name, offset, size, stride, metadata)


def _in_storage(storage: StorageSpec, dtype: str, offset: Any, size: Any, stride: Any, metadata: Any) -> TensorSpec:
    shape, strides = _integers(size, "shape"), _integers(stride, "stride")
    offset = _integers([offset], "offset")[0] + storage.view
    if math.prod(max(1, n) for n in shape) >= _MAX_SIZE:
        raise FileFormatError("it has a tensor with an impossible shape")
    if len(shape) != len(strides):
        raise FileFormatError("it has a tensor with more strides than dimensions, or fewer")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if all(shape) else offset - 1
    if (last + 1) * ITEM_BYTES[dtype] > storage.nbytes:
        raise FileFormatError(
            f"it has a tensor of shape {list(shape)} that does not fit into its storage of {storage.nbytes:,} bytes"
        )
    return TensorSpec(storage, dtype, offset, shape, strides, "a conjugate or negative view" if metadata else "")


def _parameter(data: Any, *_: Any) -> TensorSpec:
    if type(data) is not TensorSpec:
        raise FileFormatError("it has a parameter that is not a tensor")
    return data


def _with_type(function: Any, kind: Any, arguments: Any, _state: Any) -> TensorSpec:
    if (
        type(function) is not _Name
        or function.call is None
        or type(kind) is not _Name
        or kind.call is not None
        or type(arguments) is not tuple
    ):
        raise FileFormatError("it has a tensor of an unknown kind")
    return _parameter(function.call(*arguments))


def _unusable(kind: str) -> Callable[..., TensorSpec]:
    return lambda *_: TensorSpec(None, "", 0, (), (), kind)


def _ordered(*pairs: Any) -> _Dict:
    if not pairs:
        return _Dict()
    try:
        return _Dict({_key(key): value for key, value in pairs[0]})
    except (TypeError, ValueError) as error:
        raise FileFormatError("it has an invalid OrderedDict") from error


def _size(*value: Any) -> tuple[int, ...]:
    return _integers(value[0] if value else (), "shape")


def _text(value: Any = "", *_: Any) -> str:
    return str(value) if type(value) in (str, int) else ""


def _latin1(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise FileFormatError("its pickle is corrupt")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


_NAMES: dict[str, Any] = {
    "_codecs.encode": _Name("encode", _latin1),  # how protocol 2 writes bytes
    "__builtin__.bytes": _Name("bytes", _no_bytes),
    "collections.OrderedDict": _Name("OrderedDict", _ordered),
    "torch._utils._rebuild_tensor": _Name("_rebuild_tensor", _tensor),
    "torch._utils._rebuild_tensor_v2": _Name("_rebuild_tensor_v2", _tensor),
    "torch._utils._rebuild_tensor_v3": _Name("_rebuild_tensor_v3", _typed_tensor),
    "torch._utils._rebuild_parameter": _Name("_rebuild_parameter", _parameter),
    "torch._utils._rebuild_parameter_with_state": _Name("_rebuild_parameter_with_state", _parameter),
    "torch._tensor._rebuild_from_type_v2": _Name("_rebuild_from_type_v2", _with_type),
    "torch.Tensor": _Name("Tensor"),
    "torch.nn.parameter.Parameter": _Name("Parameter"),
    "torch.nn.parameter.Buffer": _Name("Buffer"),
    "torch.Size": _Name("Size", _size),
    "torch.device": _Name("device", _text),
    "torch.serialization._get_layout": _Name("_get_layout", _text),
    "torch._utils._rebuild_qtensor": _Name("_rebuild_qtensor", _unusable("quantised")),
    "torch._utils._rebuild_sparse_tensor": _Name("_rebuild_sparse_tensor", _unusable("sparse")),
    "torch._utils._rebuild_sparse_csr_tensor": _Name("_rebuild_sparse_csr_tensor", _unusable("sparse")),
    "torch._utils._rebuild_nested_tensor": _Name("_rebuild_nested_tensor", _unusable("nested")),
    "torch._utils._rebuild_meta_tensor_no_storage": _Name(
        "_rebuild_meta_tensor_no_storage", _unusable("on the meta device, without data")
    ),
    "torch.per_tensor_affine": "per_tensor_affine",
    "torch.per_channel_affine": "per_channel_affine",
    "torch.storage.UntypedStorage": _StorageType(""),
    "torch.storage._UntypedStorage": _StorageType(""),
    **{f"torch.{name}": DType(name) for name in ITEM_BYTES},
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in DTYPES.items()},
    **{f"torch.cuda.{name}": _StorageType(dtype) for name, dtype in DTYPES.items()},
}


def storage_of(identity: Any) -> StorageSpec:
    """The storage of a persistent id: ("storage", type, key, device, elements), plus a view or None
    in files of torch before 1.6.

    Raises:
        FileFormatError: another kind of id.
    """
    valid = (
        type(identity) is tuple
        and len(identity) in (5, 6)
        and identity[0] == "storage"
        and type(identity[1]) is _StorageType
        and type(identity[2]) is str
        and type(identity[4]) is int
        and 0 <= identity[4] < _MAX_SIZE
    )
    if not valid:
        raise FileFormatError("it refers to something outside that is not a storage of tensors")
    view = identity[5] if len(identity) == 6 else None
    if view is None:
        return StorageSpec(identity[2], identity[1].dtype, identity[4])
    if type(view) is not tuple or len(view) != 3:
        raise FileFormatError("it has an invalid view of a storage")
    return StorageSpec(identity[2], identity[1].dtype, identity[4], _integers([view[1]], "offset")[0])


def _key(value: Any) -> Any:
    if type(value) not in (str, int, float, bool, bytes, type(None)):
        raise FileFormatError("it has a dictionary whose keys are not text or numbers")
    return value


class Unpickler:
    """Reads consecutive pickles from `data`; `at` is the position of the next."""

    def __init__(self, data: bytes | mmap.mmap, at: int = 0):
        self.data, self.at = data, at
        self.storages: list[StorageSpec] = []

    def load(self) -> Any:
        """Read the next object: dicts, lists, tuples, strings, bytes, numbers, None, DType and
        TensorSpec.

        Raises:
            Forbidden: it refers to anything else.
            FileFormatError: truncated or corrupt.
        """
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        try:
            while (code := self._take(1)[0]) != ord("."):
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise FileFormatError(
                        f"its pickle has an instruction that torch.save does not write (0x{code:02x})"
                    )
                operation(self)
            if self._marks or len(self._stack) != 1:
                raise FileFormatError("its pickle is corrupt")
            return self._stack.pop()
        except (
            IndexError,
            KeyError,
            TypeError,
            AttributeError,
            UnicodeError,
            struct.error,
            OverflowError,
            RecursionError,
        ) as error:
            raise FileFormatError("its pickle is corrupt") from error

    def _take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise FileFormatError("its pickle is truncated")
        found = self.data[self.at : end]
        self.at = end
        return found

    def _number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1000)
        if end < 0:
            raise FileFormatError("its pickle is corrupt")
        found = self.data[self.at : end]
        self.at = end + 1
        return found.decode("utf-8")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise FileFormatError("its pickle is corrupt")
        full = f"{module}.{name}"
        if full not in _NAMES:
            raise Forbidden(full)
        self._push(_NAMES[full])

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _reduce(self) -> None:
        arguments, name = self._stack.pop(), self._stack.pop()
        if type(name) is not _Name or name.call is None or type(arguments) is not tuple:
            raise FileFormatError("its pickle calls something that is not a tensor or plain data")
        self._push(name.call(*arguments))

    def _build(self) -> None:
        self._stack.pop()  # the attributes
        if type(self._stack[-1]) not in (_Dict, TensorSpec):
            raise FileFormatError("its pickle changes an object that is not a dictionary or a parameter")

    def _persistent(self) -> None:
        found = storage_of(self._stack.pop())
        self.storages.append(found)
        self._push(found)

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise FileFormatError("its pickle is corrupt")
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, _Dict) or len(items) % 2:
            raise FileFormatError("its pickle is corrupt")
        for i in range(0, len(items), 2):
            target[_key(items[i])] = items[i + 1]

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise FileFormatError("its pickle is corrupt")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._push(items)

    def _remember(self, place: int) -> None:
        self._memo[place] = self._stack[-1]


_OPERATIONS: dict[int, Callable[[Unpickler], Any]] = {
    ord(code): operation
    for code, operation in {
        b"\x80": lambda u: u._take(1),  # PROTO
        b"\x95": lambda u: u._take(8),  # FRAME
        b"(": lambda u: u._mark(),
        b"0": lambda u: u._stack.pop(),
        b"1": lambda u: u._since_mark(),
        b"N": lambda u: u._push(None),
        b"\x88": lambda u: u._push(True),
        b"\x89": lambda u: u._push(False),
        b"J": lambda u: u._push(u._number(4, True)),
        b"K": lambda u: u._push(u._number(1)),
        b"M": lambda u: u._push(u._number(2)),
        b"\x8a": lambda u: u._push(u._number(u._number(1), True)),
        b"G": lambda u: u._push(struct.unpack(">d", u._take(8))[0]),
        b"U": lambda u: u._push(u._take(u._number(1)).decode("utf-8")),
        b"T": lambda u: u._push(u._take(u._number(4)).decode("utf-8")),
        b"X": lambda u: u._push(u._take(u._number(4)).decode("utf-8")),
        b"\x8c": lambda u: u._push(u._take(u._number(1)).decode("utf-8")),
        b"\x8d": lambda u: u._push(u._take(u._number(8)).decode("utf-8")),
        b"B": lambda u: u._push(u._take(u._number(4))),
        b"C": lambda u: u._push(u._take(u._number(1))),
        b"\x8e": lambda u: u._push(u._take(u._number(8))),
        b"}": lambda u: u._push({}),
        b"]": lambda u: u._push([]),
        b")": lambda u: u._push(()),
        b"a": lambda u: u._extend([u._stack.pop()]),
        b"e": lambda u: u._extend(u._since_mark()),
        b"s": lambda u: u._set([u._stack.pop(-2), u._stack.pop()]),
        b"u": lambda u: u._set(u._since_mark()),
        b"t": lambda u: u._push(tuple(u._since_mark())),
        b"\x85": lambda u: u._tuple(1),
        b"\x86": lambda u: u._tuple(2),
        b"\x87": lambda u: u._tuple(3),
        b"q": lambda u: u._remember(u._number(1)),
        b"r": lambda u: u._remember(u._number(4)),
        b"\x94": lambda u: u._remember(len(u._memo)),
        b"h": lambda u: u._push(u._memo[u._number(1)]),
        b"j": lambda u: u._push(u._memo[u._number(4)]),
        b"c": lambda u: u._name(u._line(), u._line()),
        b"\x93": lambda u: u._stack_global(),
        b"R": lambda u: u._reduce(),
        b"b": lambda u: u._build(),
        b"Q": lambda u: u._persistent(),
    }.items()
}
