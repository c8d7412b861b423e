"""The recurrent state of a model: for each block a tuple of tensors, whose meaning only the version's file knows."""

from collections.abc import Callable

from torch import Tensor

State = tuple[tuple[Tensor, ...], ...]


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The state with the function applied to every tensor."""
    return tuple(tuple(map(function, block)) for block in state)


def leaves(state: State) -> list[Tensor]:
    """All tensors of the state, in a fixed order."""
    return [tensor for block in state for tensor in block]
