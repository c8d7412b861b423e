"""A CPU that takes some tensors for a GPU's, so that what would make the host wait for one is seen without one."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv import compat

aten = torch.ops.aten
# The operations of torch whose result the host needs before it can go on: a number, or a size that depends on numbers.
_ASKING = {
    "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "nonzero_static", "_unique", "_unique2", "unique_consecutive",
    "unique_dim", "bincount", "repeat_interleave.Tensor", "allclose", "histc", "is_pinned",
}  # fmt: skip
_READING = {
    "cpu",
    "tolist",
    "numpy",
    "__array__",
}  # with a tensor on a CPU these ask for nothing that could be seen below


class Asked(AssertionError):
    """The host asked for a number of the device."""


class Device(TorchDispatchMode):
    """Tensors given to `place`, and all that is computed from them, are the device's. While it is `armed`, asking for their numbers raises Asked.

    Not seen: copies between main memory and a GPU, as here both are one (tests/gpu sees them).

    Attributes:
        seen: operations on the device's tensors while armed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.armed, self.seen, self._storages = False, 0, {}
        self._reading = _Reading(self)

    def __enter__(self):
        self._reading.__enter__()
        return super().__enter__()

    def __exit__(self, *arguments):
        super().__exit__(*arguments)
        self._reading.__exit__(*arguments)

    def place(self, x: Any) -> None:
        """Take a tensor, or those in lists, for the device's."""
        if isinstance(x, torch.Tensor):
            if x.numel():
                storage = compat.storage(x)
                self._storages[storage.data_ptr()] = storage  # kept, so that no other comes to lie there
        elif isinstance(x, list | tuple):
            for part in x:
                self.place(part)

    def holds(self, x: Any) -> bool:
        """Whether it is the device's, or any in a list."""
        if isinstance(x, torch.Tensor):
            return compat.storage(x).data_ptr() in self._storages
        return isinstance(x, list | tuple) and any(self.holds(part) for part in x)

    @contextlib.contextmanager
    def disarmed(self) -> Iterator[None]:
        """What may wait."""
        before, self.armed = self.armed, False
        try:
            yield
        finally:
            self.armed = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = self.holds(args) or self.holds(list(kwargs.values()))
        if ours and self.armed:
            self.seen += 1
            packet, overload = str(function).removeprefix("aten.").split(".")[:2]
            by_mask = packet.startswith(("index", "_index")) and packet in (
                "index",
                "index_put",
                "index_put_",
                "_index_put_impl_",
            )
            if {packet, f"{packet}.{overload}"} & _ASKING or (
                by_mask and any(i is not None and i.dtype == torch.bool for i in args[1])
            ):
                raise Asked(f"{function} waits for the device")
        result = function(*args, **kwargs)
        if ours:
            self.place(result)
        return result


class _Reading(TorchFunctionMode):
    def __init__(self, device: Device):
        super().__init__()
        self._device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if self._device.armed and name in _READING and self._device.holds(args[0]):
            raise Asked(f"Tensor.{name} waits for the device")
        return function(*args, **(kwargs or {}))
