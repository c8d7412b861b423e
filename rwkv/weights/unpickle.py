"""An unpickler that can only build plain data and descriptions of tensors.

A pickle is a program for a stack machine that can import and call anything. This unpickler imports
nothing: names (GLOBAL) are looked up in an allow-list of functions of this package
(rwkv.weights.pickled_names), and any other name is an error. BUILD, which sets attributes, is
accepted only for OrderedDicts and parameters, and ignored. Opcodes that torch.save does not write
are errors.
"""

import mmap
import struct
from collections.abc import Callable
from typing import Any

from rwkv.errors import FileFormatError
from rwkv.weights.pickled_names import NAMES, Dict, Forbidden, Name, StorageSpec, TensorSpec, key_of, storage_of


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
        if full not in NAMES:
            raise Forbidden(full)
        self._push(NAMES[full])

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _reduce(self) -> None:
        arguments, name = self._stack.pop(), self._stack.pop()
        if type(name) is not Name or name.call is None or type(arguments) is not tuple:
            raise FileFormatError("its pickle calls something that is not a tensor or plain data")
        self._push(name.call(*arguments))

    def _build(self) -> None:
        self._stack.pop()  # the attributes
        if type(self._stack[-1]) not in (Dict, TensorSpec):
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
        if type(target) not in (dict, Dict) or len(items) % 2:
            raise FileFormatError("its pickle is corrupt")
        for i in range(0, len(items), 2):
            target[key_of(items[i])] = items[i + 1]

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
