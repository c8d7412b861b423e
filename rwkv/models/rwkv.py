"""The language model: embedding, a version's blocks, output norm and head; with state and gradient
checkpointing.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv import compat
from rwkv.kernels.elementwise.seeds import Seeds
from rwkv.kernels.head_loss import head_loss, log_probabilities
from rwkv.kernels.linear import Matrix
from rwkv.models.layers import Device, Norm, dropout, repeated
from rwkv.models.state import State
from rwkv.models.version import Version, version_of


class Head(Matrix):
    """Output layer: computes logits, or directly their loss. (ZeRO-3 gathers the weight only in
    forward, so all is done there.)
    """

    def forward(
        self, x: Tensor, targets: Tensor | None = None, loss_mask: Tensor | None = None, by_row: bool = False
    ) -> Tensor:
        """x [..., D] → logits [..., V]; with targets, the mean loss, or `by_row` the
        log-probability of every row (see rwkv.kernels.head_loss).
        """
        if targets is None:
            return super().forward(x)
        if by_row:
            assert loss_mask is not None
            return log_probabilities(x, self.weight, targets, loss_mask)
        return head_loss(x, self.weight, targets, loss_mask)


class RWKV(nn.Module):
    """An RWKV language model. Matrices are uninitialised until `initialise` is called or a
    checkpoint is loaded.

    Args:
        sizes: the version's Sizes; its class determines the version.
        grad_cp: gradient checkpointing: save only each block's input and recompute the block in the
            backward pass.
        dropout: dropout probability, in training, of the embedding and of the residual stream after
            every mix (upstream's --dropout).
        device: device of the parameters; "meta": shapes only.

    Attributes:
        reentrant: use torch's reentrant checkpointing, in which a separate backward pass of the
            recomputed block runs within the module's hooks.
    """

    def __init__(self, sizes: Any, grad_cp: bool = False, dropout: float = 0.0, device: Device = None):
        super().__init__()
        self.sizes, self.grad_cp, self.dropout = sizes, grad_cp, dropout
        self.reentrant = False
        V, D = sizes.vocab_size, sizes.n_embd
        self.emb = nn.Embedding.from_pretrained(torch.empty(V, D, device=device), freeze=False)
        self.blocks = nn.ModuleList(self.version.Block(sizes, layer, device) for layer in range(sizes.n_layer))
        self.ln_out = Norm(D, device=device)
        self.head = Head(D, V, bias=False, device=device)

    @property
    def version(self) -> Version:
        """The version's module."""
        return version_of(self.sizes)

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Replace a parameter, also one on the meta device, by a tensor, which is not copied."""
        owner, _, leaf = name.rpartition(".")
        module = self.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(value, getattr(module, leaf).requires_grad))

    @torch.no_grad()
    def initialise(self, emb_scale: float, frozen: bool = False) -> None:
        """Initialise all weights in place, by upstream's rules.

        Args:
            emb_scale: the embedding is uniform in ±emb_scale; upstream uses the initial learning
                rate.
            frozen: the matrices will not be trained, so none is initialised to zero, which would
                block gradients.
        """
        self.version.initialise(self, emb_scale, frozen)

    def initial_state(self, batch: int, like: Tensor | None = None) -> State:
        """The state before the first token of a document, with the device and dtype of `like`
        (default: the embedding, which must not be sharded).
        """
        empty = self._empty_state(batch, self.emb.weight if like is None else like)
        return self.with_wkv(empty, self._tuned())

    def _tuned(self) -> dict[int, Tensor]:
        found = {i: getattr(getattr(block, "att", None), "time_state", None) for i, block in enumerate(self.blocks)}
        return {i: time_state for i, time_state in found.items() if time_state is not None}

    def with_wkv(self, state: State, tuned: Mapping[int, Tensor]) -> State:
        """A state with the WKV states of these blocks replaced by tuned ones.

        Args:
            tuned: `att.time_state` by block.
        """

        def replaced(i: int, block: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if i not in tuned:
                return block
            wkv = self.version.wkv_state(tuned[i]).to(block[1])
            return block[0], repeated(wkv, len(block[1])), *block[2:]

        return tuple(replaced(i, block) for i, block in enumerate(state))

    def _empty_state(self, batch: int, like: Tensor) -> State:
        block = self.version.initial_state(self.sizes, batch, like)
        return tuple(block for _ in self.blocks)

    def hidden(self, tokens: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """tokens [B, T], integers in [0, V) → the head's input [B, T, D], and the state after the
        last token.

        Args:
            state: the state before the first token; None: that at the start of a document, which
                is empty, or tuned (`sizes.time_state`).
            reset: bool [B, T], True at the first token of a document, where the state is reset.
        """
        return self.after_embedding(self.emb(tokens), state, reset)

    def after_embedding(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The embedded tokens x [B, T, D] → what `hidden` returns. Other arguments as there."""
        if compat.autocast_dtype(x.device.type) is None:
            # the dtype of the run; a frozen embedding may be stored in bf16. (ZeRO-3 would keep
            # ln_out.weight gathered after an access by name.)
            x = x.to(next(self.ln_out.parameters()).dtype)
        if state is None:  # like x, because ZeRO-3 keeps the embedding's weight gathered after an access
            state = self._empty_state(len(x), x)
            if self.sizes.time_state:  # the blocks reset to it; ZeRO-3 gathers it only there
                starts = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
                starts[:, 0] = True
                reset = starts if reset is None else reset | starts
        p = self.dropout if self.training else 0.0
        x, carry, after = dropout(x, p), (), []  # carry: tensors that blocks pass to the next block
        for block, before in zip(self.blocks, state, strict=True):
            x, new, carry = self._run_block(block, x, before, carry, reset, p)
            after.append(new)
        return self.ln_out(x), tuple(after)

    def forward(self, tokens: Tensor, state: State | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """tokens [B, T] → logits [B, T, V], and the state after the last token. Arguments as in
        `hidden`.
        """
        x, state = self.hidden(tokens, state, reset)
        return self.head(x), state

    def _run_block(self, block: nn.Module, *arguments: Any) -> Any:
        if not (self.grad_cp and torch.is_grad_enabled()):
            return block(*arguments)
        seeds = Seeds()

        def run(*arguments: Any) -> Any:  # the block's only random numbers are seeds of dropout
            with seeds:
                return block(*arguments)

        if self.reentrant:
            return _checkpoint_reentrant(run, *arguments)
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)


def _checkpoint_reentrant(
    block: Callable[..., Any],
    x: Tensor,
    state: tuple[Tensor, ...],
    carry: tuple[Tensor, ...],
    reset: Tensor | None,
    dropout: float,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    n = len(state)

    def flat(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:  # tensors in tuples are not supported
        y, after, carried = block(x, tensors[:n], tensors[n:], reset, dropout)
        return y, *after, *carried

    if not x.requires_grad:  # after a frozen embedding; gradients are computed only if an input requires them
        x = x.detach().requires_grad_()
    y, *tensors = checkpoint(flat, x, *state, *carry, use_reentrant=True, preserve_rng_state=False)
    return y, tuple(tensors[:n]), tuple(tensors[n:])


@functools.lru_cache(maxsize=16)
def shapes(sizes: Any) -> dict[str, torch.Size]:
    """The shape of every parameter of a model of these sizes; allocates no memory for them."""
    return {name: parameter.shape for name, parameter in RWKV(sizes, device="meta").named_parameters()}


@functools.lru_cache(maxsize=16)
def unused(sizes: Any) -> frozenset[str]:
    """Names of the parameters that no computation uses, and no run trains."""
    return frozenset(
        name for name, parameter in RWKV(sizes, device="meta").named_parameters() if not parameter.requires_grad
    )
