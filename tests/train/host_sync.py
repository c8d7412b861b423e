"""Detect host synchronisations without a GPU: some CPU tensors are treated as a GPU's, and reading
their values raises.
"""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv import compat
from rwkv.train.callbacks import metrics
from rwkv.train.loop.module import TrainingModule

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

    Args:
        count: count such reads in `waits` instead.

    Attributes:
        seen: number of operations on device tensors while armed.
        waits: with `count`, the number of waits while armed, by name.
    """

    def __init__(self, count: bool = False) -> None:
        super().__init__()
        self.armed, self.seen, self._storages = False, 0, {}
        self.waits: collections.Counter[str] = collections.Counter()
        self._count, self._reading = count, _Reading(self)

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

    def wait(self, operation: str) -> None:
        """While armed, count a wait or raise HostSync."""
        if self.armed and not self._count:
            raise HostSync(f"{operation} waits for the device")
        self.waits[operation] += self.armed

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
                self.wait(str(function))
        result = function(*args, **kwargs)
        if ours:
            self.place(result)
        return result


def use(patch: pytest.MonkeyPatch, fake: FakeDevice, first: int, last: int) -> None:
    """Train on a fake device: it holds the model and the batches, and is armed from the start of
    step `first` to the start of step `last`.
    """

    def fit_on_device(trainer, module, fit=compat.fit):
        fake.place(list(module.parameters()))
        with fake:
            fit(trainer, module)

    def on_start(self, batch, batch_idx, begin=TrainingModule.on_train_batch_start):
        fake.armed = first <= self.step < last
        begin(self, batch, batch_idx)

    def transfer_batch(self, batch, device, dataloader_idx, transfer=TrainingModule.transfer_batch_to_device):
        moved = transfer(self, batch, device, dataloader_idx)
        fake.place([new for i, new in enumerate(moved) if i != 2])  # the target count stays on the host
        return moved

    def read(self, read=metrics.PendingScalars.read):
        with fake.disarmed():  # reads the previous step's values: tests/train/test_nan.py
            return read(self)

    patch.setattr(compat, "fit", fit_on_device)
    patch.setattr(TrainingModule, "on_train_batch_start", on_start)
    patch.setattr(TrainingModule, "transfer_batch_to_device", transfer_batch)
    patch.setattr(metrics.PendingScalars, "read", read)
    patch.setattr(metrics, "reads_one_step_late", lambda device: True)


class _Reading(TorchFunctionMode):
    def __init__(self, device: FakeDevice):
        super().__init__()
        self._device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if self._device.armed and name in _READING and self._device.holds(args[0]):
            self._device.wait(f"Tensor.{name}")
        return function(*args, **(kwargs or {}))
