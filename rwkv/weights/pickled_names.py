"""The allow-list of names in the pickle of a checkpoint, each with a function of this package that
builds plain data or a description of a tensor.
"""

import math
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


class Dict(dict):
    """An OrderedDict, whose attributes (a state_dict's _metadata) are ignored."""


@dataclass(frozen=True)
class Name:
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
        raise FileFormatError(f"it has a tensor with an invalid {what}")
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
        raise FileFormatError("it has a tensor with an invalid shape")
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
        type(function) is not Name
        or function.call is None
        or type(kind) is not Name
        or kind.call is not None
        or type(arguments) is not tuple
    ):
        raise FileFormatError("it has a tensor of an unknown kind")
    return _parameter(function.call(*arguments))


def _unusable(kind: str) -> Callable[..., TensorSpec]:
    return lambda *_: TensorSpec(None, "", 0, (), (), kind)


def _ordered(*pairs: Any) -> Dict:
    if not pairs:
        return Dict()
    try:
        return Dict({key_of(key): value for key, value in pairs[0]})
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


NAMES: dict[str, Any] = {  # module.attribute: what a pickle may refer to
    "_codecs.encode": Name("encode", _latin1),  # how protocol 2 writes bytes
    "__builtin__.bytes": Name("bytes", _no_bytes),
    "collections.OrderedDict": Name("OrderedDict", _ordered),
    "torch._utils._rebuild_tensor": Name("_rebuild_tensor", _tensor),
    "torch._utils._rebuild_tensor_v2": Name("_rebuild_tensor_v2", _tensor),
    "torch._utils._rebuild_tensor_v3": Name("_rebuild_tensor_v3", _typed_tensor),
    "torch._utils._rebuild_parameter": Name("_rebuild_parameter", _parameter),
    "torch._utils._rebuild_parameter_with_state": Name("_rebuild_parameter_with_state", _parameter),
    "torch._tensor._rebuild_from_type_v2": Name("_rebuild_from_type_v2", _with_type),
    "torch.Tensor": Name("Tensor"),
    "torch.nn.parameter.Parameter": Name("Parameter"),
    "torch.nn.parameter.Buffer": Name("Buffer"),
    "torch.Size": Name("Size", _size),
    "torch.device": Name("device", _text),
    "torch.serialization._get_layout": Name("_get_layout", _text),
    "torch._utils._rebuild_qtensor": Name("_rebuild_qtensor", _unusable("quantised")),
    "torch._utils._rebuild_sparse_tensor": Name("_rebuild_sparse_tensor", _unusable("sparse")),
    "torch._utils._rebuild_sparse_csr_tensor": Name("_rebuild_sparse_csr_tensor", _unusable("sparse")),
    "torch._utils._rebuild_nested_tensor": Name("_rebuild_nested_tensor", _unusable("nested")),
    "torch._utils._rebuild_meta_tensor_no_storage": Name(
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
        raise FileFormatError("it refers to external data that is not a storage of tensors")
    view = identity[5] if len(identity) == 6 else None
    if view is None:
        return StorageSpec(identity[2], identity[1].dtype, identity[4])
    if type(view) is not tuple or len(view) != 3:
        raise FileFormatError("it has an invalid view of a storage")
    return StorageSpec(identity[2], identity[1].dtype, identity[4], _integers([view[1]], "offset")[0])


def key_of(value: Any) -> Any:
    """A key of a dictionary. Raises FileFormatError unless it is text, bytes, a number or None."""
    if type(value) not in (str, int, float, bool, bytes, type(None)):
        raise FileFormatError("it has a dictionary whose keys are not text or numbers")
    return value
