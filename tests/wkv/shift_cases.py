"""The token shift of RWKV-6: inputs, its formula, and the accuracy required of the kernels."""

import torch

from rwkv.kernels.elementwise import shift

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def inputs(B, T, D, n, R, dtype, seed=0):
    """x, last, the weights, low, up."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    x, last, low = normal(B, T, D).to(dtype), normal(B, D).to(dtype), normal(B, T, n * R).to(dtype)
    return [x, last, *(normal(1, 1, D) for _ in range(n)), low, 0.3 * normal(n, R, D)]


def formula(x, last, *others, reset=None):
    *weights, low, up = others
    before = torch.cat([last[:, None], x[:, :-1]], 1)
    if reset is not None:
        before = before.masked_fill(reset[..., None], 0)
    parts = low.view(*low.shape[:2], len(up), -1).unbind(2)
    return [x + (before - x) * (w + part @ u) for w, part, u in zip(weights, parts, up, strict=True)]


def outputs_and_gradients(function, tensors, dtype=None, wanted=None):
    leaves = [
        t.detach().to(dtype or t.dtype).requires_grad_(wanted is None or i in wanted) for i, t in enumerate(tensors)
    ]
    outputs = function(*leaves)
    g = torch.Generator().manual_seed(5)
    grads = [torch.randn(y.shape, generator=g).to(tensors[0].dtype).to(y) for y in outputs]
    torch.autograd.backward(outputs, grads)
    return [*(y.detach() for y in outputs), *(t.grad for t in leaves)]


def shifted(run, reset):
    def function(x, last, *others):
        *weights, low, up = others
        return shift.shift(run, x, last, reset, weights, low, up)

    return function


def check(run, dtype, shape, resets, device="cpu"):
    """Outputs and gradients of the kernels `run` for a shape (B, T, D, mixtures, rank)."""
    tensors = [t.to(device) for t in inputs(*shape, dtype)]
    reset = torch.rand(shape[:2], generator=torch.Generator().manual_seed(3)) < 0.2
    reset = reset.to(device) if resets else None
    found = outputs_and_gradients(shifted(run, reset), tensors)
    exact = outputs_and_gradients(lambda *x: formula(*x, reset=reset), tensors, torch.float64)
    for ours, truth in zip(found, exact, strict=True):
        # rounded once, low · up and its gradient too; sums of at most 100 tokens and 5 mixtures
        allowed = 4 * ROUNDING[dtype] * max(1.0, float(truth.abs().max()))
        assert float((ours - truth).abs().max()) <= allowed
