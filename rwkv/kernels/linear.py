"""A linear layer without bias that keeps little, and its three matrix products by the faster of the libraries that torch brings.

torch multiplies fp32 matrices on CPUs by MKL, which on processors that are not Intel's leaves part of their width unused; where torch can hand them to
oneDNN as they lie, that does not (docs/decisions/001). Which of the two takes a product depends on its shape alone, so that a run repeats bit for bit.
"""

import torch
from torch import Tensor, nn

from rwkv import compat
from rwkv.kernels.elementwise.native import Recipe, compute_dtype

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
        ctx.again = again.function if again else None
        kept = (again.parts if again else (x,)) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(weight, *kept)
        return product(rows(x), weight.to(x.dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        weight, *kept = ctx.saved_tensors
        flat, gx, gw = rows(g), None, None
        if ctx.needs_input_grad[0]:
            gx = product_of_gradient(flat, weight.to(g.dtype)).view(*g.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            x = ctx.again(*kept) if ctx.again else kept[0]
            gw = weight_gradient(flat, rows(x)).to(weight.dtype)
        return gx, gw, None


def linear(x: Tensor, weight: Tensor, again: Recipe | None = None) -> Tensor:
    """x Wᵀ in x's compute dtype: [..., in] → [..., out].

    Keeps what `again` forms x from, x itself without one, nothing of x where the weight is frozen.
    """
    return _Linear.apply(x.to(compute_dtype(x)), weight, again)


class Matrix(nn.Linear):
    """nn.Linear without bias, by `linear`. At first its memory holds no values, and so costs nothing: they come from a checkpoint or from
    rwkv.models.init, and a 14b model should not be filled twice."""

    def reset_parameters(self) -> None:
        """Nothing. (torch's skip_init would go through torch.compiler: 2 s and 150 MB.)"""

    def forward(self, x: Tensor, again: Recipe | None = None) -> Tensor:
        """x [..., in] → [..., out]; `again`: how x is formed again for the weight's gradient."""
        return linear(x, self.weight, again)
