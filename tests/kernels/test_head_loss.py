"""The chunked loss against a plain implementation."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv.kernels import head_loss as loss
from rwkv.kernels import linear
from rwkv.kernels.elementwise import native
from rwkv.kernels.head_loss import head_loss, log_probabilities


class PlainL2Wrap(torch.autograd.Function):
    """L2Wrap of upstream: identity forward, max · 1e-4 / (B·T) at the argmax backward."""

    @staticmethod
    def forward(ctx, value, logits):
        ctx.save_for_backward(logits)
        return value

    @staticmethod
    def backward(ctx, grad_output):
        (logits,) = ctx.saved_tensors
        top, index = logits.max(-1, keepdim=True)
        return grad_output, torch.zeros_like(logits).scatter_(
            -1, index, top * 1e-4 / (logits.shape[0] * logits.shape[1])
        )


def plain_and_chunked(x, weight, targets):
    results = []
    for plain in (True, False):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if plain:
            logits = a @ w.t()
            value = PlainL2Wrap.apply(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits)
        else:
            value = head_loss(a, w, targets)
        value.backward()
        results.append((value.detach(), a.grad, w.grad))
    return results


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 1000])
def test_matches_cross_entropy_with_l2wrap(monkeypatch, chunk_tokens):
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": chunk_tokens * 4 * 37})
    torch.manual_seed(0)
    x, weight, targets = torch.randn(3, 5, 8), torch.randn(37, 8) * 3, torch.randint(37, (3, 5))
    for plain, chunked in zip(*plain_and_chunked(x, weight, targets), strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)  # fp32, different summation order


def test_l2wrap_scales_with_loss():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(2, 5, 8, requires_grad=True), torch.randn(37, 8) * 3, torch.randint(37, (2, 5))
    (whole,) = torch.autograd.grad(head_loss(x, weight, targets), x)
    (half,) = torch.autograd.grad(head_loss(x, weight, targets) / 2, x)
    torch.testing.assert_close(half, whole / 2, rtol=1e-6, atol=0)  # fp32 rounding of products


def test_huge_logits():
    x = torch.full((1, 2, 4), 1e4, requires_grad=True)
    value = head_loss(x, torch.randn(10, 4) * 10, torch.tensor([[0, 1]]))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("chunk_tokens", [2, 1000])
def test_loss_mask(monkeypatch, chunk_tokens):
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": chunk_tokens * 4 * 37})
    torch.manual_seed(0)
    x, weight, targets = (
        torch.randn(3, 5, 8, requires_grad=True),
        (torch.randn(37, 8) * 3).requires_grad_(),
        torch.randint(37, (3, 5)),
    )
    mask = torch.rand(3, 5) < 0.4
    value = head_loss(x, weight, targets, mask)
    gradients = torch.autograd.grad(value, (x, weight))
    logits = x @ weight.t()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    n = int(mask.sum())
    torch.testing.assert_close(
        value, (losses * mask).sum() / n, rtol=1e-5, atol=1e-6
    )  # fp32, different summation order
    wrap = 0.5e-4 * logits.max(-1).values.square()  # its derivative is L2Wrap's
    expected = torch.autograd.grad(((losses + wrap) * mask).sum() / n, (x, weight))
    for ours, plain in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert not gradients[0][~mask].any()


def test_no_targets():
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(37, 8, requires_grad=True)
    value = head_loss(x, weight, torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, dtype=torch.bool))
    value.backward()
    assert float(value.detach()) == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_all_ones_mask():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(3, 5, 8), torch.randn(37, 8) * 3, torch.randint(37, (3, 5))
    assert torch.equal(head_loss(x, weight, targets), head_loss(x, weight, targets, torch.ones(3, 5, dtype=torch.bool)))


class CallCounter(TorchDispatchMode):
    """Count the operations that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    @property
    def count(self):
        return self.calls.total()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def test_frozen_head():
    """A frozen head gets no gradient, and its matmul is skipped."""
    gradients, counts = [], []
    for frozen in (True, False):
        torch.manual_seed(0)
        x, weight = torch.randn(1, 4, 8, requires_grad=True), torch.randn(20, 8, requires_grad=not frozen)
        with CallCounter() as mode:
            head_loss(x, weight, torch.zeros(1, 4, dtype=torch.long)).backward()
        assert (weight.grad is None) == frozen
        gradients.append(x.grad)
        counts.append(mode.count)
    assert torch.equal(*gradients)
    assert counts[0] < counts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_count_independent_of_vocabulary(monkeypatch, dtype):
    """Without the workspace of CPU libraries, as on GPUs, each matmul of a chunk is one kernel."""
    monkeypatch.setattr(loss, "uses_onednn", lambda *_: False)
    monkeypatch.setattr(linear, "uses_onednn", lambda *_: False)

    def calls(vocab: int) -> int:
        monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 4 * 4 * vocab})  # four tokens
        x, weight = torch.randn(8, 6, dtype=dtype, requires_grad=True), torch.randn(vocab, 6, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16), CallCounter() as mode:
            head_loss(x, weight, torch.arange(8))
        return mode.count

    assert calls(8 * loss.SLICE) == calls(10)


@pytest.mark.parametrize("chunk_tokens", [2, 1000])
def test_log_probabilities_of_rows(monkeypatch, chunk_tokens):
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": chunk_tokens * 4 * 37})
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 8, requires_grad=True), (torch.randn(37, 8) * 3).requires_grad_()
    targets, mask, factors = torch.randint(37, (3, 5)), torch.rand(3, 5) < 0.5, torch.randn(3)
    mask[1] = False
    found = log_probabilities(x, weight, targets, mask)
    gradients = torch.autograd.grad((found * factors).sum(), (x, weight))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    by_token = (exact[0] @ exact[1].t()).log_softmax(-1).gather(2, targets[..., None])[..., 0]
    expected = (by_token * mask).sum(1)
    assert found[1] == 0
    assert mask[[0, 2]].any(1).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)  # fp32 against fp64
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * factors).sum(), exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    assert not gradients[0][~mask].any()


PADDED = {"cpu": 64, "cuda": 64}  # as on GPUs
TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("dtype", "weight_dtype"), TYPES)
@pytest.mark.parametrize("vocab", [61, 65, 128, 1000])
def test_padded_rows(monkeypatch, vocab, dtype, weight_dtype, compiled):
    """Rows of logits of a multiple of 64 elements, as on GPUs, with NaN beyond the vocabulary."""
    length = -(-vocab // 64) * 64
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 7 * 4 * length})  # seven tokens of padded rows
    monkeypatch.setattr(loss, "uses_onednn", lambda *_: False)
    if not compiled:
        monkeypatch.setattr(native, "_kernels", lambda *_: None)

    def results():
        torch.manual_seed(0)
        x, weight = torch.randn(4, 5, 16, requires_grad=True), (torch.randn(vocab, 16) * 2).to(weight_dtype)
        weight.requires_grad_()
        targets, mask = torch.randint(vocab, (4, 5)), torch.rand(4, 5) < 0.8
        targets[0, 0] = vocab - 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = [head_loss(x, weight, targets, mask), log_probabilities(x, weight, targets, mask)]
        gradients = [torch.autograd.grad(y.sum(), (x, weight)) for y in found]
        return [*found, *(g for pair in gradients for g in pair)]

    expected, empty = results(), torch.Tensor.new_empty
    lengths = []

    def filled(self, *sizes, **options):
        made = empty(self, *sizes, **options)
        if len(sizes) == 2:  # the logits
            lengths.append(sizes[1])
            made.fill_(float("nan"))
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    monkeypatch.setattr(loss, "ROW_MULTIPLE", PADDED)
    found = results()
    assert set(lengths) == {length}
    # The gradients of x are sums of one or two matmuls: fp32 in another order, or rounded to bf16
    # once more. Gradients of bf16 weights are summed over chunks, of other lengths at 65, in bf16.
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for ours, plain in zip(found, expected, strict=True):
        assert (ours - plain).abs().max() <= 2 * rounding * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_rows_are_not_copied(monkeypatch, dtype):
    """A vocabulary that is no multiple of 64 takes one more matmul per product, and no copies."""
    monkeypatch.setattr(loss, "uses_onednn", lambda *_: False)
    monkeypatch.setattr(linear, "uses_onednn", lambda *_: False)
    monkeypatch.setattr(loss, "ROW_MULTIPLE", PADDED)

    def calls(vocab):
        monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 4 * 4 * 192})  # four tokens: two chunks
        x, weight = torch.randn(8, 6, dtype=dtype, requires_grad=True), torch.randn(vocab, 6, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16), CallCounter() as mode:
            head_loss(x, weight, torch.arange(8)).backward()
        return mode.calls

    whole, ragged = calls(192), calls(191)
    views = {"aten::slice", "aten::alias", "aten::t"}
    more = {name: ragged[name] - whole[name] for name in whole | ragged if name not in views}
    # two chunks of x Wᵀ, g W and gᵀ x; in bf16 the last is added to a gradient in fp32
    expected = {"aten::mm": 2, "aten::addmm_": 4}
    if dtype == torch.bfloat16:
        expected = {"aten::mm": 4, "aten::addmm_": 2, "aten::add_": 2}
    assert {name: n for name, n in more.items() if n} == expected
