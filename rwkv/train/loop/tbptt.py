"""The loss of sequences that do not fit into memory, piece by piece in time, with the state carried from one piece to the next.

Truncated backpropagation through time (Williams & Peng 1990) cuts the gradient at the pieces' borders: a token learns from what follows in
its own piece. The exact way runs over the sequence twice: once for the state before each piece, and once backwards, where every piece is
computed again from its state, and hands the gradient of that state to the piece before. Either way one piece at a time is in memory,
and in the exact way also a state for each, 4·(2D + 3A) bytes per block and row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rwkv.kernels.head_loss import head_loss
from rwkv.models import RWKV
from rwkv.models.state import State, leaves, map_state


def mean_loss(
    model: RWKV, x: Tensor, y: Tensor, counts: Tensor | None, reset: Tensor | None, length: int, exact: bool
) -> Tensor:
    """`head_loss` of a batch, [B, T] each, in pieces of `length` tokens: the mean over all of them, 0 if no target counts; `counts` as there.

    Its value is that of the whole sequence in any case, its gradient if `exact`. The gradients are formed at once, as head_loss forms its
    own, and the backward pass only scales them.
    """
    trained = [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    return _InPieces.apply(_Sequence(model, x, y, counts, reset, length), exact, *trained)


class _Sequence:
    def __init__(self, model: RWKV, x: Tensor, y: Tensor, counts: Tensor | None, reset: Tensor | None, length: int):
        self.model, self.tensors = model, (x, y, counts, reset)
        self.pieces = [slice(begin, begin + length) for begin in range(0, x.shape[1], length)]
        self.start = model.initial_state(x.shape[0])
        self.count = max(1, _counted(y, counts))

    def loss(self, piece: slice, state: State) -> tuple[Tensor, State]:
        """The sum over the piece's targets, and the state after it."""
        x, y, counts, reset = self.part(piece)
        hidden, state = self.model.hidden(x, state, reset)
        return head_loss(hidden, self.model.head.weight, y, counts) * _counted(y, counts), state

    def part(self, piece: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        x, y, *others = self.tensors
        counts, reset = (None if tensor is None else tensor[:, piece].contiguous() for tensor in others)
        return x[:, piece].contiguous(), y[:, piece].contiguous(), counts, reset

    def states(self) -> list[tuple[State, Tensor]]:
        """The state before each piece, and that of the random numbers, which dropout draws from, so that it draws the same again."""
        before, state = [], self.start
        for piece in self.pieces:
            before.append((state, torch.get_rng_state()))
            x, _, _, reset = self.part(piece)
            _, state = self.model.hidden(x, state, reset)
        return before


class _InPieces(torch.autograd.Function):
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
        grads, ctx.grads = ctx.grads, None  # handed over: they become the parameters' .grad without a copy
        return None, None, *(grad if grad is None else grad.mul_(scale / ctx.count) for grad in grads)


def _forwards(sequence: _Sequence, trained: tuple[nn.Parameter, ...], grads: list[Tensor | None]) -> Iterator[Tensor]:
    state = sequence.start
    for piece in sequence.pieces:
        with torch.set_grad_enabled(bool(trained)):
            loss, state = sequence.loss(piece, map_state(Tensor.detach, state))
        if trained and loss.requires_grad:
            _add(grads, torch.autograd.grad(loss, trained, allow_unused=True))
        yield loss.detach()


def _backwards(sequence: _Sequence, trained: tuple[nn.Parameter, ...], grads: list[Tensor | None]) -> Iterator[Tensor]:
    before, onward = sequence.states(), None  # the gradients of the state after the piece
    random = torch.get_rng_state()
    for piece, (state, drawn) in zip(reversed(sequence.pieces), reversed(before), strict=True):
        torch.set_rng_state(drawn)
        with torch.enable_grad():
            state = map_state(lambda tensor: tensor.detach().requires_grad_(), state)
            loss, after = sequence.loss(piece, state)
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


def _counted(y: Tensor, counts: Tensor | None) -> int:
    return y.numel() if counts is None else int(counts.sum())


def _add(grads: list[Tensor | None], found: tuple[Tensor | None, ...]) -> None:
    for i, grad in enumerate(found):
        if grad is not None:
            held = grads[i]
            grads[i] = grad if held is None else held.add_(grad)
