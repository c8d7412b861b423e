"""The closure of an optimizer step."""

from collections.abc import Callable
from typing import Any

import torch


@torch.enable_grad()
def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The loss that an optimizer's closure returns; None without a closure. Lightning's closures
    run the forward and backward pass.
    """
    return None if closure is None else closure()
