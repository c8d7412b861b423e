"""Head, cross-entropy and L2Wrap over chunks of tokens, so that the logits [N, V] never stand whole in memory."""

import torch
from torch import Tensor

L2WRAP = 1e-4  # upstream's factor
CHUNK_BYTES = 64 << 20  # fp32 logits of one chunk: 256 tokens at V = 65536


class _HeadLoss(torch.autograd.Function):
    # The gradients are formed in the forward pass, while a chunk's logits are at hand; backward only scales them.
    @staticmethod
    def forward(ctx, x, weight, targets):
        count, vocab = targets.numel(), weight.shape[0]
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        want_x, want_weight = ctx.needs_input_grad[:2]
        gx = torch.empty_like(x) if want_x else None
        gweight = torch.zeros_like(weight) if want_weight else None
        size = max(1, CHUNK_BYTES // (4 * vocab))
        for begin in range(0, count, size):
            rows = slice(begin, begin + size)
            logits = (x[rows] @ weight.t()).float()  # [n, V]
            target = targets[rows, None]
            top, argmax = logits.max(1, keepdim=True)  # [n, 1]
            loss -= (logits.gather(1, target) - top).sum()
            logits.sub_(top).exp_()
            total = logits.sum(1, keepdim=True)
            loss += total.log().sum()
            if not (want_x or want_weight):
                continue
            grad = logits.div_(total)  # softmax, then −1 at the target and L2Wrap's pull at the largest logit; 1/N waits for backward,
            grad.scatter_add_(1, target, torch.full_like(top, -1))  # as fp16 has no room for softmax/N
            grad.scatter_add_(1, argmax, top * L2WRAP)
            grad = grad.to(weight.dtype)
            if want_x:
                gx[rows] = (grad @ weight).to(x.dtype)
            if want_weight:
                gweight.addmm_(grad.t(), x[rows].to(weight.dtype))
        ctx.save_for_backward(gx, gweight)
        ctx.count = max(1, count)
        return loss / ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        gx, gweight = ctx.saved_tensors
        scale = scale / ctx.count
        return None if gx is None else gx * scale, None if gweight is None else gweight * scale, None


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of softmax(x Wᵀ) at the targets; its gradient carries L2Wrap.

    L2Wrap (BlinkDL) keeps the largest logit of each token from drifting: in the backward pass 1e-4 · max / N is added to the
    gradient of that logit, as if the loss had the term 5e-5 · Σ max² / N. Unlike upstream's, ours follows the scale of the
    loss, so that accumulation and loss scaling do not change its weight.

    Args:
        x: [..., D], what the head reads.
        weight: [V, D], the head. Gets no gradient if it is frozen.
        targets: [...] int64 in [0, V).
        counts: [...] bool, the targets that the mean is over; the others cost nothing, get no gradient and are not in N. None: all.

    Returns:
        A scalar, fp32; 0 without gradient where no target counts.
    """
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if counts is not None:
        counts = counts.reshape(-1)
        x, targets = x[counts], targets[counts]
    return _HeadLoss.apply(x, weight, targets)
