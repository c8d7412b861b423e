"""The recurrent state of a model: per block a tuple of tensors, whose meaning depends on the
version.
"""

from collections.abc import Callable

from torch import Tensor

State = tuple[tuple[Tensor, ...], ...]


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply a function to every tensor of the state."""
    return tuple(tuple(map(function, block)) for block in state)


def leaves(state: State) -> list[Tensor]:
    """All tensors of the state, in a fixed order."""
    return [tensor for block in state for tensor in block]
