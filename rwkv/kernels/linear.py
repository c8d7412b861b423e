"""A linear layer without bias that keeps little, and its three matrix products by the faster of the libraries that torch brings.

torch multiplies fp32 matrices on CPUs by MKL, which on processors that are not Intel's leaves part of their width unused; where torch can hand them to
oneDNN as they lie, that does not (docs/decisions/001). Which of the two takes a product depends on its shape alone, so that a run repeats bit for bit.
"""

import torch
from torch import Tensor, nn

from rwkv import compat
from rwkv.kernels.elementwise.native import compute_dtype, recompute_of

SMALL = 1 << 20  # multiplications below which oneDNN's set-up costs more than it gains

_onednn = compat.onednn_product()


def needs_room(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes a product with W, and so room for W and for the result once more while it runs: it copies W into a layout of its own."""
    return (
        _onednn is not None
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[0] > 1
        and x.shape[0] * weight.numel() >= SMALL
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ: [N, in], [out, in] → [N, out]."""
    return _onednn(x, weight) if needs_room(x, weight) else x @ weight.t()


def product_of_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """g W, the gradient of x: [N, out], [out, in] → [N, in]."""
    return _onednn(g, weight.t()) if needs_room(g, weight) else g @ weight


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """gᵀ x, the gradient of W: [N, out], [N, in] → [out, in], in g's dtype."""
    return g.t() @ x


def rows(x: Tensor) -> Tensor:
    """[..., D] → [N, D]."""
    return x.reshape(-1, x.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, again):
        trained = ctx.needs_input_grad[1]
        ctx.again = again.function
        ctx.save_for_backward(weight, *(again.inputs if trained else ()))
        return product(rows(x), weight.to(x.dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        weight, *inputs = ctx.saved_tensors
        flat, gx, gw = rows(g), None, None
        if ctx.needs_input_grad[0]:
            gx = product_of_gradient(flat, weight.to(g.dtype)).view(*g.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            gw = weight_gradient(flat, rows(ctx.again(*inputs))).to(weight.dtype)
        return gx, gw, None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in x's compute dtype: [..., in] → [..., out].

    Saves x or what recomputes it (rwkv.kernels.elementwise.native); nothing of x where the weight is frozen.
    """
    x = x.to(compute_dtype(x))
    return _Linear.apply(x, weight, recompute_of(x))


class Matrix(nn.Linear):
    """nn.Linear without bias, by `linear`. Its weight is uninitialised memory until a checkpoint or RWKV.initialise fills
    it: a 14b model should not be filled twice."""

    def reset_parameters(self) -> None:
        """Nothing. (torch's skip_init imports torch.compiler: 2 s and 150 MB.)"""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        return linear(x, self.weight)
