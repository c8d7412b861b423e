"""Head, cross-entropy and L2Wrap over chunks of tokens, so that the logits [N, V] are never whole in memory."""

import torch
from torch import Tensor

from rwkv.kernels.elementwise import native
from rwkv.kernels.linear import needs_room, product, product_of_gradient, rows, weight_gradient

L2WRAP = 1e-4  # upstream's factor
CHUNK_BYTES = 64 << 20  # of a chunk's logits in fp32: 256 tokens at V = 65536
SLICE = (
    1 << 11
)  # tokens of the vocabulary at a time, where oneDNN takes a product and copies: 8192 take 30 MB more and are no faster (docs/decisions/002)


def _logits(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x Wᵀ in `out` [n, V]."""
    if not needs_room(x, weight):
        return torch.mm(x, weight.t(), out=out)
    for word in range(0, len(weight), SLICE):
        out[:, word : word + SLICE] = product(x, weight[word : word + SLICE])
    return out


def _gradient(g: Tensor, weight: Tensor) -> Tensor:
    """g W."""
    if not needs_room(g, weight):
        return g @ weight
    total = product_of_gradient(g[:, :SLICE], weight[:SLICE])
    for word in range(SLICE, len(weight), SLICE):
        total += product_of_gradient(g[:, word : word + SLICE], weight[word : word + SLICE])
    return total


def _add_weight_gradient(total: Tensor, g: Tensor, x: Tensor) -> None:
    """total += gᵀ x, in one kernel or two however many tokens there are. In one dtype nothing is allocated."""
    if total.dtype == g.dtype:
        total.addmm_(g.t(), x)
    else:
        total += weight_gradient(g, x)


class _HeadLoss(torch.autograd.Function):
    # The gradients are formed in the forward pass, while a chunk's logits are at hand; backward only scales them: 1/N waits until then,
    # as fp16 has no room for softmax/N.
    @staticmethod
    def forward(ctx, x, weight, targets):
        count, vocab = targets.numel(), weight.shape[0]
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        want_x, want_weight = ctx.needs_input_grad[:2]
        gx = torch.empty_like(x) if want_x else None
        gweight = torch.zeros_like(weight) if want_weight else None
        computed = weight.to(x.dtype)
        size = max(1, CHUNK_BYTES // (4 * vocab))
        buffer = x.new_empty(min(size, count), vocab)
        for begin in range(0, count, size):
            chunk = x[begin : begin + size]
            logits = _logits(chunk, computed, buffer[: len(chunk)])  # [n, V]
            loss += native.softmax_gradient(logits, targets[begin : begin + size], L2WRAP, want_x or want_weight)
            if gx is not None:
                gx[begin : begin + size] = _gradient(logits, computed)
            if gweight is not None:
                _add_weight_gradient(gweight, logits, chunk)
        ctx.save_for_backward(gx, gweight)
        ctx.count = max(1, count)
        return loss / ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        gx, gweight = ctx.saved_tensors
        scale = scale / ctx.count
        # In place: autograd refuses a second backward, which would scale twice.
        return None if gx is None else gx.mul_(scale), None if gweight is None else gweight.mul_(scale), None


def _indices(loss_mask: Tensor, device: torch.device) -> Tensor:
    """The indices where loss_mask [N] is True, on the device; copying them from main memory to a GPU does not synchronise."""
    indices = loss_mask.nonzero().squeeze(1)
    if device.type == "cuda" and not indices.is_cuda:
        indices = indices.pin_memory()
    return indices.to(device, non_blocking=True)


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of softmax(x Wᵀ) at the targets; its gradient carries L2Wrap.

    L2Wrap (BlinkDL) keeps the largest logit of each token small: the backward pass adds 1e-4 · max / N to the gradient of
    that logit, as if the loss had the term 5e-5 · Σ max² / N. Unlike upstream's, it scales with the loss, so that
    accumulation and loss scaling do not change its weight.

    Args:
        x: [..., D], the head's input.
        weight: [V, D], the head's; no gradient if it is frozen.
        targets: [...] int64 in [0, V).
        loss_mask: [...] bool, the N targets that contribute to the loss; the others cost nothing and get no gradient.
            None: all. Best in main memory, also for x on a GPU: the host needs the number of rows, and asking a GPU
            for it synchronises.

    Returns:
        A scalar, fp32; 0 with zero gradient where no target contributes.
    """
    x, targets = rows(x.to(native.compute_dtype(x))), targets.reshape(-1)
    if loss_mask is not None:
        indices = _indices(loss_mask.reshape(-1), x.device)
        x, targets = x.index_select(0, indices), targets.index_select(0, indices)
    return _HeadLoss.apply(x, weight, targets)
