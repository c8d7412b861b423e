"""What the autograd functions of the operators share."""

import torch
from torch import Tensor


def prepared(
    state: Tensor | None, reset: Tensor | None, initial: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """state, reset and initial as the kernels need them: contiguous, states in fp32, and `initial`
    only with resets.
    """
    return (
        None if state is None else state.float().contiguous(),
        None if reset is None else reset.contiguous(),
        None if initial is None or reset is None else initial.float().contiguous(),
    )


def refuse_second_derivatives(operator: str) -> None:
    """Raise RuntimeError in a backward pass with create_graph. (once_differentiable would do the
    same, but is slower.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f'{operator}: the compiled kernels have no second derivatives (create_graph=True); use impl="reference"'
        )
