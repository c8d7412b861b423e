"""Detect host synchronisations without a GPU: some CPU tensors are treated as a GPU's, and reading
their values raises.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv import compat

aten = torch.ops.aten
# Operations whose result the host needs before it can continue: a value, or a size that depends on
# values.
_SYNCING = {
    "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "nonzero_static", "_unique", "_unique2", "unique_consecutive",
    "unique_dim", "bincount", "repeat_interleave.Tensor", "allclose", "histc", "is_pinned",
}  # fmt: skip
_READING = {"cpu", "tolist", "numpy", "__array__"}  # on CPU tensors these dispatch no operation


class HostSync(AssertionError):
    """The host read a value of a device tensor."""


class FakeDevice(TorchDispatchMode):
    """Treats tensors passed to `place`, and everything computed from them, as on a device. While
    `armed`, reading their values raises HostSync.

    Copies between host and device are not detected, as both share memory (tests/gpu detects them).

    Attributes:
        seen: number of operations on device tensors while armed.
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
        """Treat a tensor, or the tensors in (nested) lists, as on the device."""
        if isinstance(x, torch.Tensor):
            if x.numel():
                storage = compat.storage(x)
                self._storages[storage.data_ptr()] = storage  # a reference, so that the address is not reused
        elif isinstance(x, list | tuple):
            for part in x:
                self.place(part)

    def holds(self, x: Any) -> bool:
        """Whether a tensor, or any tensor in (nested) lists, is on the device."""
        if isinstance(x, torch.Tensor):
            return compat.storage(x).data_ptr() in self._storages
        return isinstance(x, list | tuple) and any(self.holds(part) for part in x)

    @contextlib.contextmanager
    def disarmed(self) -> Iterator[None]:
        """Allow host synchronisations."""
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
            if {packet, f"{packet}.{overload}"} & _SYNCING or (
                by_mask and any(i is not None and i.dtype == torch.bool for i in args[1])
            ):
                raise HostSync(f"{function} waits for the device")
        result = function(*args, **kwargs)
        if ours:
            self.place(result)
        return result


class _Reading(TorchFunctionMode):
    def __init__(self, device: FakeDevice):
        super().__init__()
        self._device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if self._device.armed and name in _READING and self._device.holds(args[0]):
            raise HostSync(f"Tensor.{name} waits for the device")
        return function(*args, **(kwargs or {}))
