"""Truncated BPTT: the loss of long sequences in chunks, with the recurrent state carried between
chunks.

Truncated backpropagation through time (Williams & Peng 1990) stops gradients at chunk boundaries.
With `exact`, gradients are those of the whole sequence: one forward pass stores the state before
each chunk; then, from last to first, every chunk is recomputed from its state and passes the
gradient of that state to the previous chunk. Memory is that of one chunk; with `exact` also one
state per chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rwkv.kernels.head_loss import head_loss
from rwkv.models import RWKV
from rwkv.models.state import State, leaves, map_state


def mean_loss(
    model: RWKV, x: Tensor, y: Tensor, loss_mask: Tensor | None, reset: Tensor | None, length: int, exact: bool
) -> Tensor:
    """The mean loss of a batch (tensors [B, T]) in chunks of `length` tokens; 0 if no target
    contributes.

    The value equals that of the whole sequence; the gradient does only if `exact`. As in head_loss,
    gradients are computed in the forward pass, and the backward pass scales them.
    """
    trained = [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    return _Chunked.apply(_Sequence(model, x, y, loss_mask, reset, length), exact, *trained)


class _Sequence:
    def __init__(self, model: RWKV, x: Tensor, y: Tensor, loss_mask: Tensor | None, reset: Tensor | None, length: int):
        self.model, self.tensors = model, (x, y, loss_mask, reset)
        self.chunks = [slice(begin, begin + length) for begin in range(0, x.shape[1], length)]
        self.count = max(1, _targets(y, loss_mask))

    def loss(self, chunk: slice, state: State | None) -> tuple[Tensor, State]:
        """The loss summed over the chunk's targets, and the state after the chunk; None: the first
        chunk.
        """
        x, y, loss_mask, reset = self.select(chunk)
        hidden, state = self.model.hidden(x, state, reset)
        return head_loss(hidden, self.model.head.weight, y, loss_mask) * _targets(y, loss_mask), state

    def select(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        x, y, *others = self.tensors
        loss_mask, reset = (None if tensor is None else tensor[:, chunk].contiguous() for tensor in others)
        return x[:, chunk].contiguous(), y[:, chunk].contiguous(), loss_mask, reset

    def states(self) -> list[tuple[State | None, Tensor]]:
        """The model's and the random generator's state before each chunk (for identical dropout
        masks).
        """
        before: list[tuple[State | None, Tensor]] = []
        state: State | None = None
        for chunk in self.chunks:
            before.append((state, torch.get_rng_state()))
            x, _, _, reset = self.select(chunk)
            _, state = self.model.hidden(x, state, reset)
        return before


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sequence, exact, *trained):
        ctx.count, ctx.grads = sequence.count, [None] * len(trained)
        losses = (
            _exact_losses(sequence, trained, ctx.grads)
            if exact and trained
            else _truncated_losses(sequence, trained, ctx.grads)
        )
        return sum(losses) / ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        grads, ctx.grads = ctx.grads, None  # not shared, so autograd uses them as .grad without a copy
        return None, None, *(grad if grad is None else grad.mul_(scale / ctx.count) for grad in grads)


def _truncated_losses(
    sequence: _Sequence, trained: tuple[nn.Parameter, ...], grads: list[Tensor | None]
) -> Iterator[Tensor]:
    state: State | None = None
    for chunk in sequence.chunks:
        with torch.set_grad_enabled(bool(trained)):
            loss, state = sequence.loss(chunk, state and map_state(Tensor.detach, state))
        if trained and loss.requires_grad:
            _add(grads, torch.autograd.grad(loss, trained, allow_unused=True))
        yield loss.detach()


def _exact_losses(
    sequence: _Sequence, trained: tuple[nn.Parameter, ...], grads: list[Tensor | None]
) -> Iterator[Tensor]:
    before, state_grads = sequence.states(), None  # gradients of the state after the chunk
    rng_state_after = torch.get_rng_state()
    for chunk, (state, rng_state) in zip(reversed(sequence.chunks), reversed(before), strict=True):
        torch.set_rng_state(rng_state)
        with torch.enable_grad():
            state = state and map_state(lambda tensor: tensor.detach().requires_grad_(), state)
            loss, after = sequence.loss(chunk, state)
        outputs = [(loss, torch.ones_like(loss))]
        if state_grads:
            outputs += zip(leaves(after), state_grads, strict=True)
        outputs = [(output, grad) for output, grad in outputs if output.requires_grad and grad is not None]
        gradients = torch.autograd.grad(
            [output for output, _ in outputs],
            [*trained, *leaves(state or ())],
            [grad for _, grad in outputs],
            allow_unused=True,
        )
        _add(grads, gradients[: len(trained)])
        state_grads = gradients[len(trained) :]
        yield loss.detach()
    torch.set_rng_state(rng_state_after)


def _targets(y: Tensor, loss_mask: Tensor | None) -> int:
    return y.numel() if loss_mask is None else int(loss_mask.sum())


def _add(grads: list[Tensor | None], found: tuple[Tensor | None, ...]) -> None:
    for i, grad in enumerate(found):
        if grad is not None:
            total = grads[i]
            grads[i] = grad if total is None else total.add_(grad)
