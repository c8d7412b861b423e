"""The head with a loss, in chunks of tokens, so that only one chunk of logits is in memory: mean
cross-entropy with L2Wrap, or the log-probability of every row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rwkv.kernels import bf16_copy
from rwkv.kernels.elementwise import native
from rwkv.kernels.linear import linear_forward, linear_grad_input, linear_grad_weight, rows, uses_onednn

L2WRAP = 1e-4  # upstream's factor
# Size of a chunk's logits in fp32, by device type: 256 and 1024 tokens at V = 65536. On a GPU fewer
# chunks need fewer launches; larger ones could overflow in fp16, which sums gradients of a chunk.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# Elements of which the rows of logits are a multiple, by device type (docs/decisions/037)
ROW_MULTIPLE = {"cpu": 1, "cuda": 64}
SLICE = 1 << 11  # vocabulary entries per matmul with oneDNN, to limit its copies (docs/decisions/002)


def chunk_tokens(vocab: int, device: str) -> int:
    """Tokens per chunk for a vocabulary of this size on a device of this type."""
    return max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (4 * row_length(vocab, device)))


def row_length(vocab: int, device: str) -> int:
    """Elements from a row of logits to the next: the vocabulary, rounded up on GPUs."""
    multiple = ROW_MULTIPLE.get(device, 1)
    return -(-vocab // multiple) * multiple


def _parts(weight: Tensor) -> list[slice]:
    """The vocabulary as one matmul, or as two, of which the first has a multiple of ROW_MULTIPLE
    entries.
    """
    vocab = len(weight)
    whole = vocab - vocab % ROW_MULTIPLE.get(weight.device.type, 1)
    return [part for part in (slice(0, whole), slice(whole, vocab)) if part.start < part.stop]


def _logits(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x Wᵀ in `out` [n, V]."""
    if not uses_onednn(x, weight):
        for part in _parts(weight):
            torch.mm(x, weight[part].t(), out=out[:, part])
        return out
    for begin in range(0, len(weight), SLICE):
        out[:, begin : begin + SLICE] = linear_forward(x, weight[begin : begin + SLICE])
    return out


def _gradient(g: Tensor, weight: Tensor) -> Tensor:
    """g W."""
    if not uses_onednn(g, weight):
        *others, last = _parts(weight)  # the small part first, because its sum is rounded twice
        total = g[:, last] @ weight[last]
        for part in others:
            total.addmm_(g[:, part], weight[part])
        return total
    total = linear_grad_input(g[:, :SLICE], weight[:SLICE])
    for begin in range(SLICE, len(weight), SLICE):
        total += linear_grad_input(g[:, begin : begin + SLICE], weight[begin : begin + SLICE])
    return total


def _add_grad_weight(total: Tensor, g: Tensor, x: Tensor) -> None:
    """total += gᵀ x, in one or two kernels per part. If dtypes are equal, nothing is allocated."""
    for part in _parts(total):
        if total.dtype == g.dtype:
            total[part].addmm_(g[:, part].t(), x)
        else:
            total[part].add_(linear_grad_weight(g[:, part], x))


class _HeadLoss(torch.autograd.Function):
    # The forward pass computes the gradients while a chunk's logits are in memory; the backward
    # pass only scales them, also by 1/N, because softmax/N would underflow in fp16.
    @staticmethod
    def forward(ctx, x, weight, targets):
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        want_x, want_weight = ctx.needs_input_grad[:2]
        gx = torch.empty_like(x) if want_x else None
        gweight = torch.zeros_like(weight) if want_weight else None
        computed = bf16_copy.cached(weight, x.dtype).to(x.dtype)
        for part, logits in _chunks(x, computed):
            loss += native.cross_entropy_(logits, targets[part], L2WRAP, want_x or want_weight)
            if gx is not None:
                gx[part] = _gradient(logits, computed)
            if gweight is not None:
                _add_grad_weight(gweight, logits, x[part])
        ctx.save_for_backward(gx, gweight)
        ctx.count = max(1, len(targets))
        return loss / ctx.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        gx, gweight = ctx.saved_tensors
        scale = scale / ctx.count
        # In place: autograd raises on a second backward, which would scale twice.
        return None if gx is None else gx.mul_(scale), None if gweight is None else gweight.mul_(scale), None


class _LogProbabilities(torch.autograd.Function):
    # The backward pass recomputes the logits: the gradients of the log-probabilities, which weight
    # the tokens, are not known before.
    @staticmethod
    def forward(ctx, x, weight, targets):
        ctx.save_for_backward(x, weight, targets)
        found = torch.empty(len(targets), device=x.device, dtype=torch.float32)
        computed = bf16_copy.cached(weight, x.dtype).to(x.dtype)
        for part, logits in _chunks(x, computed):
            found[part] = native.log_probabilities_(logits, targets[part], 0.0, False)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, targets = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad[:2]
        gx = torch.empty_like(x) if want_x else None
        gweight = torch.zeros_like(weight) if want_weight else None
        computed, g = bf16_copy.cached(weight, x.dtype).to(x.dtype), -g[:, None]  # of the cross-entropy
        for part, logits in _chunks(x, computed):
            native.log_probabilities_(logits, targets[part], 0.0, True)
            # weighted where there are D elements per token, not V
            if gx is not None:
                gx[part] = _gradient(logits, computed) * g[part]
            if gweight is not None:
                _add_grad_weight(gweight, logits, (x[part] * g[part]).to(x.dtype))
        return gx, gweight, None


def _chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The logits x Wᵀ of consecutive tokens of x [n, D], which the next chunk overwrites."""
    vocab, device = len(weight), x.device.type
    size = chunk_tokens(vocab, device)
    buffer = x.new_empty(min(size, len(x)), row_length(vocab, device))[:, :vocab]
    for begin in range(0, len(x), size):
        chunk = x[begin : begin + size]
        yield slice(begin, begin + len(chunk)), _logits(chunk, weight, buffer[: len(chunk)])


def _indices(loss_mask: Tensor, device: torch.device) -> Tensor:
    """The indices where loss_mask [N] is True, on the device, without synchronising."""
    indices = loss_mask.nonzero().squeeze(1)
    if device.type == "cuda" and not indices.is_cuda:
        indices = indices.pin_memory()
    return indices.to(device, non_blocking=True)


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, loss_mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of softmax(x Wᵀ) at the targets; its gradient carries L2Wrap.

    L2Wrap (BlinkDL) keeps the largest logit of each token small: the backward pass adds
    1e-4 · max / N to its gradient, as if the loss had the term 5e-5 · Σ max² / N. Unlike
    upstream's, it scales with the loss, so gradient accumulation and loss scaling do not change its
    weight.

    Args:
        x: [..., D], input of the head.
        weight: [V, D], weight of the head.
        targets: [...] int64 in [0, V).
        loss_mask: [...] bool, the N targets that contribute to the loss; the others are skipped.
            None: all. Pass it on the CPU even if x is on a GPU: counting targets on a GPU
            synchronises.

    Returns:
        Scalar fp32; 0 with zero gradient if no target contributes.
    """
    x, targets = rows(x.to(native.compute_dtype(x))), targets.reshape(-1)
    if loss_mask is not None:
        indices = _indices(loss_mask.reshape(-1), x.device)
        x, targets = x.index_select(0, indices), targets.index_select(0, indices)
    return _HeadLoss.apply(x, weight, targets)


def log_probabilities(x: Tensor, weight: Tensor, targets: Tensor, loss_mask: Tensor) -> Tensor:
    """The log-probability of every row's targets, in nats: Σ log softmax(x Wᵀ) at the targets that
    loss_mask selects. There is no L2Wrap.

    Args:
        x: [B, T, D], input of the head.
        weight: [V, D], weight of the head.
        targets: [B, T] int64 in [0, V).
        loss_mask: [B, T] bool; best on the CPU, as in `head_loss`.

    Returns:
        fp32 [B]; 0 for a row without selected targets.
    """
    shape, (x, targets) = targets.shape, (rows(x.to(native.compute_dtype(x))), targets.reshape(-1))
    indices = _indices(loss_mask.reshape(-1), x.device)
    found = _LogProbabilities.apply(x.index_select(0, indices), weight, targets.index_select(0, indices))
    return found.new_zeros(targets.numel()).index_copy(0, indices, found).view(shape).sum(1)
