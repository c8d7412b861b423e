"""The elementwise operations of a block and their gradients: by the compiled kernels in one pass
over memory, otherwise by torch (reference.py) and autograd. Backward passes recompute their outputs
(recompute.py).

Parameters are read in the forward pass of the module that owns them, where ZeRO-3 has gathered
them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rwkv import compat
from rwkv.kernels import gpu, load
from rwkv.kernels.elementwise import reference
from rwkv.kernels.elementwise.recompute import recompute_of, recomputed
from rwkv.kernels.elementwise.seeds import new_seed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the compiled kernels


@dataclass(frozen=True)
class Dropped:
    """Dropout of a tensor x by `seed`, computed together with x: dropout(x, seed, p)."""

    value: Tensor
    seed: Tensor
    recompute: Callable[..., Tensor]  # `value`, from the seed and the inputs of x's Recompute


def take_dropped(x: Tensor) -> Dropped | None:
    """The Dropped that the token shift computed with x, which no longer has it then; else None."""
    return x.__dict__.pop("dropped", None)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matmuls with x: autocast's if enabled, else x's."""
    return compat.autocast_dtype(x.device.type) or x.dtype


def _kernels(*tensors: Tensor) -> Any:
    """The compiled operations for these tensors; None if unavailable, e.g. for fp64.

    `wkv4`, which is in the same library, reports why they are unavailable.
    """
    if any(t.dtype not in _DTYPES for t in tensors):
        return None
    if all(t.is_cuda for t in tensors):
        device = tensors[0].device.index
        return gpu.cuda_kernels(device) if load.why_unavailable_on(device) is None else None
    if any(t.device.type != "cpu" or t.dtype == torch.float16 for t in tensors) or load.why_unavailable():
        return None
    return torch.ops.rwkv


def time_mix_kernels(*tensors: Tensor) -> Any:
    """The CUDA kernels of the time-mix (rwkv.kernels.gpu), for tensors of one dtype on a GPU; None
    if unavailable, or switched off (gpu.time_mix_enabled).
    """
    if len({t.dtype for t in tensors}) > 1 or not all(t.is_cuda for t in tensors) or not gpu.time_mix_enabled():
        return None
    return _kernels(*tensors)


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards a parameter, and gathers it only for its module's passes."""
    return hasattr(parameter, "ds_tensor")


def until_backward(parameter: Tensor) -> Tensor:
    """A parameter as a backward pass can read it: a copy if it may not be gathered then."""
    return parameter.detach().clone() if is_sharded(parameter) else parameter.detach()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        weight = weight.float()
        y, stats = _kernels(x).norm_forward(x, weight, bias.float(), eps, dtype)
        ctx.save_for_backward(x, weight, stats)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy):
        x, weight, stats = ctx.saved_tensors
        affine = any(ctx.needs_input_grad[1:3])
        return *_kernels(x).norm_backward(gy.contiguous(), x, weight, stats, affine), None, None


def _norm(eps: float, dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _kernels(x).norm_forward(x, weight, bias, eps, dtype)[0]


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x [..., D] with weight and bias [D], returned in x's compute dtype.

    Saves x and 8 bytes per token.
    """
    dtype = compute_dtype(x)
    if _kernels(x, weight) is None or x.dtype not in (dtype, torch.float32):
        return reference.norm(x, weight, bias, eps, dtype)
    x = x.contiguous()
    y = _Norm.apply(x, weight, bias, eps, dtype)
    lasting = (until_backward(t).float() for t in (weight, bias))
    return recomputed(y, functools.partial(_norm, eps, dtype), x, *lasting, several_uses=True)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, last, initial, reset, weights, recompute, drops):
        trained = ctx.needs_input_grad[4]  # only the gradient of the weights needs x
        ctx.recompute = recompute.function if trained else None
        ctx.save_for_backward(last, initial, reset, weights, *(recompute.inputs if trained else ()))
        if not drops.seeds:
            return tuple(_kernels(x).mix_forward(x, last, initial, reset, weights))
        found = _kernels(x).mix_dropout_forward(x, last, initial, reset, weights, drops.seeds, drops.p, True)
        drops.values = found[len(weights) :]
        return tuple(found[: len(weights)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gy):
        last, initial, reset, weights, *inputs = ctx.saved_tensors
        grads = [g.contiguous() for g in gy]
        x = ctx.recompute(*inputs) if ctx.recompute else grads[0]
        backward = _kernels(grads[0]).mix_backward
        gx, glast, gweights = backward(grads, x, last, initial, reset, weights, ctx.recompute is not None)
        ginitial = None
        if ctx.needs_input_grad[2] and reset is not None:
            starts = (g.masked_fill(~reset[..., None], 0).sum(1, dtype=torch.float32) for g in grads)
            ginitial = sum((1 - m) * g for m, g in zip(weights, starts, strict=True)).to(initial.dtype)
        return gx, glast if ctx.needs_input_grad[1] else None, ginitial, None, gweights, None, None


@dataclass
class Drops:
    """Dropout of a token shift's outputs: `p` of each (or empty); seeds and results where p ≠ 0."""

    p: Sequence[float]
    seeds: list[Tensor]
    values: list[Tensor] = field(default_factory=list)

    @classmethod
    def draw(cls, p: Sequence[float], device: torch.device) -> "Drops":
        """With the seeds drawn in the order of the outputs."""
        return cls(list(p), [new_seed(device) for share in p if share])

    def attach(self, outputs: Sequence[Any], recompute: Callable[[int, float], Callable[..., Tensor]]) -> None:
        """Let every output whose p is not 0 have its Dropped, for take_dropped; `recompute` of its
        index and p is that of the Dropped.
        """
        rest = zip(self.values, self.seeds, strict=True)
        for i, p in enumerate(self.p):
            if p:
                outputs[i].dropped = Dropped(*next(rest), recompute(i, p))


def _mix(
    recompute: Callable[..., Tensor],
    p: float,
    seed: Tensor | None,
    last: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    weights: Tensor,
    *inputs: Tensor | None,
) -> Tensor:
    """An output of mix; with a seed, its dropout."""
    x = recompute(*inputs)
    if seed is None:
        return _kernels(x).mix_forward(x, last, initial, reset, weights)[0]
    return _kernels(x).mix_dropout_forward(x, last, initial, reset, weights, [seed], [p], False)[0]


def mix(
    x: Tensor,
    last: Tensor,
    reset: Tensor | None,
    weights: Sequence[Tensor],
    initial: Tensor | None = None,
    drops: Sequence[float] = (),
) -> list[Tensor]:
    """Token shift: m·x + (1 − m)·previous for each m of `weights`.

    Args:
        x: [B, T, D].
        last: [B, D], the token before the first.
        reset: [B, T] bool, True where a document starts; None: nowhere.
        weights: up to three, with D elements each.
        initial: [B, D], the token before a document start; None: zeros.
        drops: probabilities with which dropout of each output is needed too. On GPUs it is computed
            in the same pass, with a new seed for each that is not 0, in this order (take_dropped).

    Saves x if the weights are trained.
    """
    stacked = torch.cat([m.reshape(1, -1) for m in weights])
    last = last.to(x.dtype).contiguous()
    if initial is None:  # read only at a document start
        initial = last if reset is None else torch.zeros_like(last)
    initial = initial.to(x.dtype).contiguous()
    kernels = _kernels(x)
    if kernels is None:
        return reference.mix(x, last, initial, reset, stacked)
    recompute, stacked = recompute_of(x), stacked.float()
    dropping = Drops.draw(drops if hasattr(kernels, "mix_dropout_forward") else (), x.device)
    mixed = _Mix.apply(x.contiguous(), last, initial, reset, stacked, recompute, dropping)
    dropping.attach(mixed, lambda i, p: functools.partial(_mix, recompute.function, p))
    function = functools.partial(_mix, recompute.function, 0.0, None)
    return [
        recomputed(y, function, last, initial, reset, m, *recompute.inputs)
        for y, m in zip(mixed, stacked.detach().split(1), strict=True)
    ]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, v, recompute):
        ctx.recompute = recompute.function
        ctx.save_for_backward(r, *recompute.inputs)
        return _kernels(r).gate_forward(r, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        r, *inputs = ctx.saved_tensors
        return *_kernels(r).gate_backward(g.contiguous(), r, ctx.recompute(*inputs).contiguous()), None


def _gate(recompute: Callable[..., Tensor], r: Tensor, *inputs: Tensor | None) -> Tensor:
    return _kernels(r).gate_forward(r, recompute(*inputs).contiguous())


def gate(r: Tensor, v: Tensor) -> Tensor:
    """σ(r)·v of two tensors of the same shape and dtype. Saves r and v."""
    if _kernels(r, v) is None:
        return reference.gate(r, v)
    r, recompute = r.contiguous(), recompute_of(v)
    y = _Gate.apply(r, v.contiguous(), recompute)
    return recomputed(y, functools.partial(_gate, recompute.function), r, *recompute.inputs)


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k):
        ctx.save_for_backward(k)
        return _kernels(k).relu2_forward(k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (k,) = ctx.saved_tensors
        return _kernels(k).relu2_backward(g.contiguous(), k)


def _relu2(k: Tensor) -> Tensor:
    return _kernels(k).relu2_forward(k)


def relu2(k: Tensor) -> Tensor:
    """max(k, 0)². Saves k."""
    if _kernels(k) is None:
        return reference.relu2(k)
    k = k.contiguous()
    return recomputed(_Relu2.apply(k), _relu2, k)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.seed, ctx.p = new_seed(x.device), p
        return dropout(x, ctx.seed, p)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return dropout(g, ctx.seed, ctx.p), None


def drop(x: Tensor, p: float) -> Tensor:
    """x / (1 − p), or 0 with probability p. Saves nothing."""
    return _Drop.apply(x, p)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x / (1 − p), or 0 with probability p; not differentiable.

    A hash of element index and seed (see new_seed) decides (reference.dropout), so no mask is
    saved.
    """
    kernels = _kernels(x)
    return kernels.dropout(x.contiguous(), seed, p) if kernels else reference.dropout(x, seed, p)


def dropout_add_(y: Tensor, x: Tensor, seed: Tensor, p: float) -> None:
    """y += dropout(x) for contiguous tensors of the same shape and dtype; not differentiable."""
    kernels = _kernels(y)
    if kernels:
        kernels.dropout_add(y, x.contiguous(), seed, p)
    else:
        y += reference.dropout(x, seed, p)


def cross_entropy_(logits: Tensor, targets: Tensor, l2wrap: float, want_gradient: bool) -> Tensor:
    """The summed cross-entropy of logits [N, V] at targets [N], scalar fp32. Rows are contiguous,
    but there may be other elements between them.

    With `want_gradient` the logits are overwritten with its gradient, plus l2wrap · max at each
    token's largest logit (the first one in case of ties).
    """
    return -log_probabilities_(logits, targets, l2wrap, want_gradient).sum()


def log_probabilities_(logits: Tensor, targets: Tensor, l2wrap: float, want_gradient: bool) -> Tensor:
    """The log-probabilities of targets [N] by logits [N, V], fp32 [N]. Arguments as in
    `cross_entropy_`: the gradient is that of the summed cross-entropy.
    """
    kernels = _kernels(logits)
    if kernels:
        stats = kernels.loss(logits, targets.contiguous(), l2wrap, want_gradient)
    else:
        stats, gradient = reference.cross_entropy(logits, targets, l2wrap)
        if want_gradient:
            logits.copy_(gradient)
    top, total, at_target = stats.unbind(1)
    return at_target - (total.log() + top)
