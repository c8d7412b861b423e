"""A linear layer without bias that saves little for the backward pass, and its three matmuls.

On CPUs, torch's fp32 matmuls call MKL, which does not use the full vector width of non-Intel
processors. Large matmuls call oneDNN instead where torch offers it (compat.onednn_matmul,
docs/decisions/001). The choice depends only on the shape, so that runs repeat bit for bit.
"""

import torch
from torch import Tensor, nn

from rwkv import compat
from rwkv.kernels import bf16_copy
from rwkv.kernels.elementwise.native import compute_dtype
from rwkv.kernels.elementwise.recompute import recompute_of
from rwkv.kernels.quant import FP8, Quantised

MIN_ONEDNN_MULTIPLICATIONS = 1 << 20  # for smaller matmuls the set-up of oneDNN costs more than it gains

_onednn = compat.onednn_matmul()

Weight = Tensor | Quantised
"""A matrix [out, in]. A quantised one is frozen, and dense only during a matmul, in FP8 never."""


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix in this dtype; in new memory only if it is quantised or of another dtype."""
    return weight.dense(dtype) if isinstance(weight, Quantised) else weight.to(dtype)


def quantised(weight: Weight) -> Quantised | None:
    """The matrix, if it is quantised; autograd saves a reference to it, and no dense matrix."""
    return weight if isinstance(weight, Quantised) else None


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether x Wᵀ is computed by oneDNN, which allocates a copy of W and of the result."""
    return (
        _onednn is not None
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[0] > 1
        and x.shape[0] * weight.numel() >= MIN_ONEDNN_MULTIPLICATIONS
    )


def linear_forward(x: Tensor, weight: Weight) -> Tensor:
    """x Wᵀ in x's dtype: [N, in], [out, in] → [N, out]."""
    if isinstance(weight, FP8) and weight.multiplies:
        return weight.times_transpose(x)
    weight = dense(weight, x.dtype)
    return _onednn(x, weight) if uses_onednn(x, weight) else x @ weight.t()


def linear_grad_input(g: Tensor, weight: Weight) -> Tensor:
    """g W, the gradient of x, in g's dtype: [N, out], [out, in] → [N, in]."""
    if isinstance(weight, FP8) and weight.multiplies:
        return weight.times(g)
    weight = dense(weight, g.dtype)
    return _onednn(g, weight.t()) if uses_onednn(g, weight) else g @ weight


def linear_grad_weight(g: Tensor, x: Tensor) -> Tensor:
    """gᵀ x, the gradient of W: [N, out], [N, in] → [out, in], in g's dtype."""
    return g.t() @ x


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b in one kernel: [M, K], [K, N] → [M, N]."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)  # beta 0: the first argument is not read


def rows(x: Tensor) -> Tensor:
    """[..., D] → [N, D]."""
    return x.reshape(-1, x.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, recompute):
        trained = ctx.needs_input_grad[1]
        ctx.recompute, ctx.quantised = recompute.function, quantised(weight)
        if not ctx.quantised:
            ctx.dtype, weight = weight.dtype, bf16_copy.cached(weight, x.dtype)
        ctx.save_for_backward(None if ctx.quantised else weight, *(recompute.inputs if trained else ()))
        return linear_forward(rows(x), weight).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        weight, *inputs = ctx.saved_tensors
        weight, flat, gx, gw = ctx.quantised or weight, rows(g), None, None
        if ctx.needs_input_grad[0]:
            gx = linear_grad_input(flat, weight).view(*g.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            gw = linear_grad_weight(flat, rows(ctx.recompute(*inputs))).to(ctx.dtype)
        return gx, gw, None


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x Wᵀ in x's compute dtype: [..., in] → [..., out].

    Saves the inputs from which x is recomputed (see rwkv.kernels.elementwise.recompute); nothing if
    the weight is frozen.
    """
    x = x.to(compute_dtype(x))
    return _Linear.apply(x, weight, recompute_of(x))


class Matrix(nn.Linear):
    """nn.Linear without bias, computed by `linear`.

    The weight is uninitialised until a checkpoint is loaded or RWKV.initialise is called, so that
    large models are not initialised twice.
    """

    def reset_parameters(self) -> None:
        """Does nothing. (torch's skip_init would import torch.compiler: 2 s and 150 MB.)"""

    def set_quantised(self, weight: Quantised) -> None:
        """Use a frozen, quantised matrix instead of the parameter."""
        del self.weight
        self.weight = weight  # type: ignore[assignment]  # a submodule of the same name

    def keep_bf16_copy(self) -> None:
        """Keep a copy of the weight for matmuls in bf16 (rwkv.kernels.bf16_copy)."""
        bf16_copy.keep(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        return linear(x, self.weight)
