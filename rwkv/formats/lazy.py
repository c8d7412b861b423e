"""Tensors that are computed when they are written, so that a file is written tensor by tensor and a
model is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv.errors import UserError

_ELEMENTS = 1 << 20


def _nothing() -> None:
    pass


def parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a tensor's rows, of about a million elements each, to bound temporary memory."""
    rows = tensor.unsqueeze(0) if tensor.dim() < 2 else tensor
    return rows.split(max(1, _ELEMENTS * len(rows) // max(1, rows.numel())))


@dataclass(frozen=True)
class Lazy:
    """A tensor to be computed, with the attributes of a tensor that do not need its values.

    Attributes:
        make: compute the tensor, on the CPU.
        release: called after the tensor was used; drops pages of mapped files from memory.
    """

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]
    release: Callable[[], None] = _nothing

    @classmethod
    def of(cls, tensor: Tensor, release: Callable[[], None] = _nothing) -> Lazy:
        """An existing tensor."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor, release)

    @classmethod
    def stack(cls, parts: Iterable[Lazy]) -> Lazy:
        """torch.stack along a new first dimension."""
        several = list(parts)
        shape = torch.Size([len(several), *several[0].shape])

        def release() -> None:
            for part in several:
                part.release()

        return cls(shape, several[0].dtype, lambda: torch.stack([part.make() for part in several]), release)

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of an element."""
        return torch.empty(0, dtype=self.dtype).element_size()

    def then(self, function: Callable[[Tensor], Tensor]) -> Lazy:
        """`function` of this tensor; it is also called with a tensor on the device "meta", for the
        shape and dtype of its result.
        """
        like = function(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return Lazy(like.shape, like.dtype, lambda: function(self.make()), self.release)

    def to(self, dtype: torch.dtype) -> Lazy:
        """The tensor in another dtype."""
        return self if dtype == self.dtype else self.then(lambda tensor: tensor.to(dtype))

    def cast(self, dtype: torch.dtype, name: str) -> Lazy:
        """The tensor in another dtype; `make` raises UserError if a value overflows in it.

        Args:
            name: of the tensor, for the message.
        """
        if dtype == self.dtype:
            return self

        def convert(tensor: Tensor) -> Tensor:
            found = tensor.to(dtype)
            if found.device.type != "meta" and not all(torch.isfinite(part).all() for part in parts(found)):
                short = str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
                raise UserError(f"{name} is not finite in {short}; use --dtype bf16 or fp32")
            return found

        return self.then(convert)
