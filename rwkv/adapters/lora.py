"""LoRA (Hu et al. 2021, arXiv:2106.09685) and DoRA (Liu et al. 2024, arXiv:2402.09353) on a model's
linear layers: inject, freeze, save, combine, merge.

x ──► W ───────────────► + ──► y        y = W x + (α/r) · B A dropout(x)
└──► A [r, in] ► B [out, r] ─┘          W is frozen; B starts at zero (no change at first)

DoRA multiplies every element of y by m / ‖row of W + (α/r) B A‖, where the vector m is trained too;
it begins with the norms of W's rows, and no gradient flows through the norm. (With dropout, peft
also drops inputs of W.)

In addition to the model's saved activations, an adapter saves e·r bytes per token (e: 2 in bf16, 4
in fp32), with DoRA e·(r + out), and in bf16 copies of A and B. The adaptable layers of a model are
defined by its version (PARTS).
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.adapters import state
from rwkv.kernels.elementwise import native
from rwkv.kernels.elementwise.recompute import recompute_of
from rwkv.kernels.elementwise.seeds import new_seed
from rwkv.kernels.linear import (
    Matrix,
    Weight,
    dense,
    linear_forward,
    linear_grad_input,
    quantised,
    rows,
    scaled_product,
)
from rwkv.models import RWKV
from rwkv.models.parts import Parts, layer_of

_MAGNITUDE = "magnitude_vector"  # lora_magnitude_vector, peft's name
_TINY = 1e-12  # lower bound of norms, so that a row of zeros is not divided by zero
_ROWS = 1024  # of a matrix converted to fp32 at a time


def parts_in(flag: str) -> tuple[str, ...]:
    """Split a flag like att,ffn into names, without validating them."""
    return tuple(part.strip() for part in flag.split(",") if part.strip())


def parts_of(names: Collection[str], known: Parts) -> list[str]:
    """The parts of an adapter whose tensors have these names, in normal form (`Parts.normal`)."""
    full = [part for part in known.full if any(known.fully_trained(name, [part]) for name in names)]
    return known.shortest(_adapted_layers(names) & {*known.layers}) + full


def foreign_layers(names: Collection[str], known: Parts) -> list[str]:
    """The adapted layers among these tensor names that cannot have an adapter here, e.g. head or
    att.gate.
    """
    return sorted(_adapted_layers(names) - {*known.layers})


def _adapted_layers(names: Collection[str]) -> set[str]:
    return {layer_of(found[1]) for name in names if (found := re.fullmatch(rf"(.*)\.lora_(A|B|{_MAGNITUDE})", name))}


def uses_dora(names: Collection[str]) -> bool:
    """Whether an adapter whose tensors have these names is DoRA."""
    return any(name.endswith(f".lora_{_MAGNITUDE}") for name in names)


class _LoRAFunction(torch.autograd.Function):
    # Saves x, or the tensors from which it is recomputed, and A x, which has r elements per token.
    @staticmethod
    def forward(ctx, x, weight, a, b, scale, dropout, recompute, dropped):
        flat, dtype = rows(x), x.dtype
        ctx.scale, ctx.dropout, ctx.recompute = scale, dropout, recompute.function
        ctx.seed = dropped.seed if dropped else new_seed(x.device) if dropout else None
        ctx.recompute_dropped = dropped.recompute if dropped else None
        ctx.quantised = quantised(weight)
        y = linear_forward(flat, weight)
        ctx.dtypes, a, b = (a.dtype, b.dtype), a.to(dtype), b.to(dtype)  # the copies are saved
        low = linear_forward(rows(dropped.value) if dropped else _apply_dropout(ctx, flat), a)  # [N, r]
        y.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(None if ctx.quantised else weight, a, b, low, *recompute.inputs)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        weight, a, b, low, *inputs = ctx.saved_tensors
        flat, gx, ga, gb = rows(g), None, None, None
        glow = linear_grad_input(flat, b)  # [N, r], without the scale
        if ctx.needs_input_grad[2]:
            if ctx.recompute_dropped:
                x = rows(ctx.recompute_dropped(ctx.seed, *inputs))
            else:
                x = _apply_dropout(ctx, rows(ctx.recompute(*inputs)))
            ga = scaled_product(glow.t(), x, ctx.scale).to(ctx.dtypes[0])
        if ctx.needs_input_grad[3]:
            # computed as [r, out], the faster layout; autograd would copy what is not contiguous
            gb = scaled_product(low.t(), flat, ctx.scale).t()
            gb = gb.to(ctx.dtypes[1], memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # not in its stubs
        if ctx.needs_input_grad[0]:
            gx = linear_grad_input(flat, ctx.quantised or weight)
            if ctx.dropout:
                native.dropout_add_(gx, scaled_product(glow, a, ctx.scale), ctx.seed, ctx.dropout)
            else:
                gx.addmm_(glow, a, alpha=ctx.scale)
            gx = gx.view(*g.shape[:-1], -1)
        return gx, None, ga, gb, None, None, None, None


def _apply_dropout(ctx, x: Tensor) -> Tensor:
    return native.dropout(x, ctx.seed, ctx.dropout) if ctx.dropout else x


class LoRALinear(nn.Module):
    """A frozen linear layer without bias, plus a trainable product of rank r, with DoRA (`dora`)
    also scaled by row. The weight's name does not change.
    """

    def __init__(self, weight: Weight, r: int, alpha: float, dropout: float = 0.0, dora: bool = False):
        super().__init__()
        out, columns = weight.shape
        self.weight: Weight = weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(r, columns, device=weight.device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out, r, device=weight.device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        norms = torch.linalg.vector_norm(dense(weight, torch.float32).detach(), dim=1) if dora else None
        self.lora_magnitude_vector = None if norms is None else nn.Parameter(norms)
        self.scale, self.dropout = alpha / r, dropout

    @property
    def input_dropout(self) -> float:
        """The probability of dropout in this pass: 0 in evaluation."""
        return self.dropout if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the compute dtype."""
        x = x.to(native.compute_dtype(x))
        tensors = x, self.weight, self.lora_A, self.lora_B
        recompute, dropped = recompute_of(x), native.take_dropped(x)
        y = _LoRAFunction.apply(*tensors, self.scale, self.input_dropout, recompute, dropped)
        if self.lora_magnitude_vector is None:
            return y
        return y * (self.lora_magnitude_vector / self._norms()).to(y.dtype)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """The norms of the rows of W + (α/r) B A, [out]: without this matrix, from
        ‖w + s b A‖² = ‖w‖² + 2 s (w Aᵀ)·b + s² b (A Aᵀ) bᵀ for every row w and b.
        """
        weight = self.weight if isinstance(self.weight, Tensor) else self.weight.dense(torch.float32)
        compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
        a, found = self.lora_A.to(compute), []
        with torch.autocast(weight.device.type, enabled=False):  # its matmuls would be in bf16
            for w, b in zip(weight.split(_ROWS), self.lora_B.to(compute).split(_ROWS), strict=True):
                w, b = w.to(compute), self.scale * b
                own = torch.linalg.vector_norm(w, dim=1).square()
                found.append(own + ((2 * (w @ a.t()) + b @ (a @ a.t())) * b).sum(1))
        return torch.cat(found).clamp_min(0).sqrt().clamp_min(_TINY)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight of a linear layer with the same outputs, in W's dtype (if quantised: fp32),
        computed in fp32.
        """
        dtype = self.weight.dtype if isinstance(self.weight, Tensor) else torch.float32
        weight = dense(self.weight, torch.float32)
        return merged(weight, self.lora_A, self.lora_B, self.scale, self.lora_magnitude_vector).to(dtype)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitudes: Tensor | None = None) -> Tensor:
    """W + scale · B A in fp32 [out, in]; with DoRA's magnitudes [out], its rows have these
    lengths.
    """
    found = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    if magnitudes is not None:
        norms = torch.linalg.vector_norm(found, dim=1).clamp_min(_TINY)
        found *= (magnitudes / norms).unsqueeze(1)
    return found


def inject(
    model: RWKV, parts: Collection[str], r: int, alpha: float, dropout: float = 0.0, dora: bool = False
) -> list[str]:
    """Add adapters to all linear layers of these parts, in place; returns the layers' names.

    `att` is key, value and receptance of every time-mix, in later versions than RWKV-4 all its
    linear layers; `ffn` all layers of every channel-mix. `state` adds an initial state
    (rwkv.adapters.state).

    Raises:
        ValueError: a part is unknown, r < 1, or the model has none of these layers.
    """
    known = model.version.PARTS
    unknown = set(parts) - set(known.names)
    if unknown or not parts:
        raise ValueError(f"LoRA parts are any of {', '.join(known.names)}; got {', '.join(sorted(unknown)) or 'none'}")
    if r < 1:
        raise ValueError(f"the LoRA rank r must be at least 1; it is {r}")
    wanted = {layer for part in parts for layer in known.layers_of(part)}
    modules = list(model.named_modules())
    names = [name for name, module in modules if isinstance(module, nn.Linear) and layer_of(name) in wanted]
    if wanted and not names:
        raise ValueError(f"this model has no linear layer of the parts {', '.join(parts)}")
    if state.PART in parts:
        state.attach(model)
    for name in names:
        layer: Any = model.get_submodule(name)
        _replace(model, name, LoRALinear(layer.weight, r, alpha, dropout, dora))
    return names


def combine(
    adapters: Sequence[tuple[Mapping[str, Tensor], float, float]], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Combine adapters into one that computes W + Σ weight · scale · B A. Its rank is the sum of
    their ranks, and its scale is 1.

    Fully trained tensors become base + Σ weight · (tensor − base); an initial state that the base
    lacks is treated as zeros.

    Args:
        adapters: (tensors, scale α/r, weight) of each.
        base: the base model's tensors.
    """
    combined: dict[str, Tensor] = {}
    ranks = [
        next((t.shape[0] for name, t in tensors.items() if name.endswith(".lora_A")), 0) for tensors, _, _ in adapters
    ]
    for name in sorted({name for tensors, _, _ in adapters for name in tensors}):
        if not re.search(r"\.lora_[AB]$", name):
            start = base[name].float() if name in base else torch.zeros(())
            combined[name] = start + sum(
                weight * (tensors[name].float() - start) for tensors, _, weight in adapters if name in tensors
            )
            continue
        is_a = name.endswith("A")
        size = next(t[name].shape[1 if is_a else 0] for t, _, _ in adapters if name in t)
        blocks = [
            tensors[name].float() * (1 if is_a else scale * weight)
            if name in tensors
            else torch.zeros((rank, size) if is_a else (size, rank))
            for (tensors, scale, weight), rank in zip(adapters, ranks, strict=True)
        ]
        combined[name] = torch.cat(blocks, 0 if is_a else 1)
    return combined


def adapter_names(model: RWKV, parts: Collection[str]) -> list[str]:
    """Names of the parameters in an adapter of these parts: lora_A and lora_B of their layers (with
    DoRA also lora_magnitude_vector), and fully trained tensors.
    """
    known = model.version.PARTS
    layers = {layer for part in parts for layer in known.layers_of(part)}

    def belongs(name: str) -> bool:
        layer, adapted, _ = name.rpartition(".lora_")
        return layer_of(layer) in layers if adapted else known.fully_trained(name, parts)

    return [name for name, _ in model.named_parameters() if belongs(name)]


def mark_trainable(model: RWKV, parts: Collection[str]) -> None:
    """Freeze all parameters except the adapter's."""
    chosen = set(adapter_names(model, parts))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def store_frozen(model: RWKV, dtype: torch.dtype) -> None:
    """Convert frozen matrices, also the low-rank ones of Parts, to this dtype and all other
    parameters to fp32, in place, one at a time. (The others are small, and decays need the
    precision.)
    """
    parts = model.version.PARTS
    for name, parameter in model.named_parameters():
        frozen = (is_matrix(name, parameter.shape) or parts.is_low_rank(name)) and not parameter.requires_grad
        parameter.data = parameter.data.to(dtype if frozen else torch.float32)


def is_matrix(name: str, shape: torch.Size) -> bool:
    """Whether a parameter is the weight of a linear layer, the embedding or the head; not the
    low-rank matrices of a time-mix, which are trained as a whole.
    """
    return name.endswith(".weight") and len(shape) == 2


def is_hidden(name: str, shape: torch.Size) -> bool:
    """Whether a parameter is the weight of a linear layer of a block."""
    return is_matrix(name, shape) and name.startswith("blocks.")


def is_quantisable(name: str, shape: torch.Size) -> bool:
    """Whether --lora_base nf4, int8 and fp8 quantise a parameter: the linear layers of the blocks.
    Not the embedding, which is a lookup, nor the head, to which the loss is more sensitive; in
    large models they are few parameters.
    """
    return is_hidden(name, shape)


def adapter_state(model: RWKV, parts: Collection[str]) -> dict[str, Tensor]:
    """The adapter's tensors under upstream's names, e.g. `blocks.0.att.key.lora_A`."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach() for name in adapter_names(model, parts)}


def merge(model: nn.Module) -> None:
    """Merge all adapters into their layers' weights, in place, and restore plain linear layers."""
    for name, layer in list(_lora_layers(model)):
        plain = Matrix(layer.weight.shape[1], layer.weight.shape[0], bias=False)
        plain.weight = nn.Parameter(layer.merged())
        _replace(model, name, plain)


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
