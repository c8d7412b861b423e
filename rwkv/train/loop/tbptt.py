"""Truncated BPTT: the loss of long sequences, chunk by chunk in time, with the state carried from chunk to chunk.

Truncated backpropagation through time (Williams & Peng 1990) stops the gradient at chunk borders: a token learns from
what follows in its own chunk. The exact way runs over the sequence twice: forward for the state before each chunk, then
backward, where every chunk is recomputed from its state and passes the gradient of that state to the chunk before.
Either way one chunk at a time is in memory, in the exact way also one state per chunk.
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
    """`head_loss` of a batch, [B, T] each, in chunks of `length` tokens: the mean over all of them, 0 if no target contributes.

    Its value is that of the whole sequence in any case, its gradient if `exact`. The gradients are computed in the forward
    pass, as head_loss computes its own, and the backward pass only scales them.
    """
    trained = [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    return _Chunked.apply(_Sequence(model, x, y, loss_mask, reset, length), exact, *trained)


class _Sequence:
    def __init__(self, model: RWKV, x: Tensor, y: Tensor, loss_mask: Tensor | None, reset: Tensor | None, length: int):
        self.model, self.tensors = model, (x, y, loss_mask, reset)
        self.chunks = [slice(begin, begin + length) for begin in range(0, x.shape[1], length)]
        self.start = model.initial_state(x.shape[0])
        self.count = max(1, _targets(y, loss_mask))

    def loss(self, chunk: slice, state: State) -> tuple[Tensor, State]:
        """The sum over the chunk's targets, and the state after it."""
        x, y, loss_mask, reset = self.select(chunk)
        hidden, state = self.model.hidden(x, state, reset)
        return head_loss(hidden, self.model.head.weight, y, loss_mask) * _targets(y, loss_mask), state

    def select(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        x, y, *others = self.tensors
        loss_mask, reset = (None if tensor is None else tensor[:, chunk].contiguous() for tensor in others)
        return x[:, chunk].contiguous(), y[:, chunk].contiguous(), loss_mask, reset

    def states(self) -> list[tuple[State, Tensor]]:
        """The state before each chunk, and that of the random generator, so that dropout draws the same again."""
        before, state = [], self.start
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
            _backwards(sequence, trained, ctx.grads) if exact and trained else _forwards(sequence, trained, ctx.grads)
        )
        return sum(losses) / ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        grads, ctx.grads = ctx.grads, None  # released: they become the parameters' .grad without a copy
        return None, None, *(grad if grad is None else grad.mul_(scale / ctx.count) for grad in grads)


def _forwards(sequence: _Sequence, trained: tuple[nn.Parameter, ...], grads: list[Tensor | None]) -> Iterator[Tensor]:
    state = sequence.start
    for chunk in sequence.chunks:
        with torch.set_grad_enabled(bool(trained)):
            loss, state = sequence.loss(chunk, map_state(Tensor.detach, state))
        if trained and loss.requires_grad:
            _add(grads, torch.autograd.grad(loss, trained, allow_unused=True))
        yield loss.detach()


def _backwards(sequence: _Sequence, trained: tuple[nn.Parameter, ...], grads: list[Tensor | None]) -> Iterator[Tensor]:
    before, onward = sequence.states(), None  # the gradients of the state after the chunk
    random = torch.get_rng_state()
    for chunk, (state, drawn) in zip(reversed(sequence.chunks), reversed(before), strict=True):
        torch.set_rng_state(drawn)
        with torch.enable_grad():
            state = map_state(lambda tensor: tensor.detach().requires_grad_(), state)
            loss, after = sequence.loss(chunk, state)
        ends = [(loss, torch.ones_like(loss))]
        if onward:
            ends += zip(leaves(after), onward, strict=True)
        ends = [(end, grad) for end, grad in ends if end.requires_grad and grad is not None]
        found = torch.autograd.grad(
            [end for end, _ in ends], [*trained, *leaves(state)], [grad for _, grad in ends], allow_unused=True
        )
        _add(grads, found[: len(trained)])
        onward = found[len(trained) :]
        yield loss.detach()
    torch.set_rng_state(random)


def _targets(y: Tensor, loss_mask: Tensor | None) -> int:
    return y.numel() if loss_mask is None else int(loss_mask.sum())


def _add(grads: list[Tensor | None], found: tuple[Tensor | None, ...]) -> None:
    for i, grad in enumerate(found):
        if grad is not None:
            held = grads[i]
            grads[i] = grad if held is None else held.add_(grad)
