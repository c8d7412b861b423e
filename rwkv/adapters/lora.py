"""LoRA (Hu et al. 2021, arXiv:2106.09685) on a model's linear layers: inject, freeze, save,
combine, merge.

x ──► W ───────────────► + ──► y        y = W x + (α/r) · B A dropout(x)
└──► A [r, in] ► B [out, r] ─┘          W is frozen; B starts at zero (no change at first)

In addition to the model's saved activations, an adapter saves e·r bytes per token (e: 2 in bf16, 4
in fp32). The adaptable layers of a model are defined by its version (PARTS).
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.kernels.elementwise import native
from rwkv.kernels.linear import Matrix, Weight, dense, linear_forward, linear_grad_input, quantised, rows
from rwkv.models import RWKV
from rwkv.models.parts import Parts, layer_of


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
    return {layer_of(re.sub(r"\.lora_[AB]$", "", name)) for name in names if name.endswith((".lora_A", ".lora_B"))}


class _LoRAFunction(torch.autograd.Function):
    # Saves x, or the tensors from which it is recomputed, and A x, which has r elements per token.
    @staticmethod
    def forward(ctx, x, weight, a, b, scale, dropout, recompute):
        flat, dtype = rows(x), x.dtype
        ctx.scale, ctx.dropout, ctx.recompute = scale, dropout, recompute.function
        ctx.seed = native.new_seed(x.device) if dropout else None
        ctx.quantised = quantised(weight)
        y = linear_forward(flat, weight)
        low = linear_forward(_apply_dropout(ctx, flat), a.to(dtype))  # [N, r]
        y.addmm_(low, b.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(None if ctx.quantised else weight, a, b, low, *recompute.inputs)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        weight, a, b, low, *inputs = ctx.saved_tensors
        flat, dtype, gx, ga, gb = rows(g), g.dtype, None, None, None
        glow = linear_grad_input(flat, b.to(dtype)).mul_(ctx.scale)  # [N, r]
        if ctx.needs_input_grad[2]:
            x = rows(ctx.recompute(*inputs))
            ga = (glow.t() @ _apply_dropout(ctx, x)).to(a.dtype)
        if ctx.needs_input_grad[3]:
            gb = (low.t() @ flat).mul_(ctx.scale).t().to(b.dtype)  # computed as [r, out]: the faster layout
        if ctx.needs_input_grad[0]:
            gx = linear_grad_input(flat, ctx.quantised or weight)
            if ctx.dropout:
                native.dropout_add_(gx, glow @ a.to(dtype), ctx.seed, ctx.dropout)
            else:
                gx.addmm_(glow, a.to(dtype))
            gx = gx.view(*g.shape[:-1], -1)
        return gx, None, ga, gb, None, None, None


def _apply_dropout(ctx, x: Tensor) -> Tensor:
    return native.dropout(x, ctx.seed, ctx.dropout) if ctx.dropout else x


class LoRALinear(nn.Module):
    """A frozen linear layer without bias, plus a trainable product of rank r. The weight's name
    does not change.
    """

    def __init__(self, weight: Weight, r: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        out, columns = weight.shape
        self.weight: Weight = weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(r, columns, device=weight.device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out, r, device=weight.device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale, self.dropout = alpha / r, dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the compute dtype."""
        x = x.to(native.compute_dtype(x))
        p = self.dropout if self.training else 0.0
        return _LoRAFunction.apply(x, self.weight, self.lora_A, self.lora_B, self.scale, p, native.recompute_of(x))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + (α/r) B A in W's dtype (fp32 if W is quantised), computed in fp32."""
        dtype = self.weight.dtype if isinstance(self.weight, Tensor) else torch.float32
        return (dense(self.weight, torch.float32) + self.scale * (self.lora_B.float() @ self.lora_A.float())).to(dtype)


def inject(model: RWKV, parts: Collection[str], r: int, alpha: float, dropout: float = 0.0) -> list[str]:
    """Add adapters to all linear layers of these parts, in place; returns the layers' names.

    `att` is key, value and receptance of every time-mix, in later versions than RWKV-4 all its
    linear layers; `ffn` all layers of every channel-mix.

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
    for name in names:
        layer: Any = model.get_submodule(name)
        _replace(model, name, LoRALinear(layer.weight, r, alpha, dropout))
    return names


def combine(
    adapters: Sequence[tuple[Mapping[str, Tensor], float, float]], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Combine adapters into one that computes W + Σ weight · scale · B A. Its rank is the sum of
    their ranks, and its scale is 1.

    Fully trained tensors become base + Σ weight · (tensor − base).

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
            start = base[name].float()
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
    """Names of the parameters in an adapter of these parts: lora_A and lora_B of their layers, and
    fully trained tensors.
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


def store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert frozen matrices to this dtype and all other parameters to fp32, in place, one at a
    time. (The others are small, and decays need the precision.)
    """
    for name, parameter in model.named_parameters():
        frozen = is_matrix(name, parameter.shape) and not parameter.requires_grad
        parameter.data = parameter.data.to(dtype if frozen else torch.float32)


def is_matrix(name: str, shape: torch.Size) -> bool:
    """Whether a parameter is the weight of a linear layer, the embedding or the head; not the
    low-rank matrices of a time-mix, which are trained as a whole.
    """
    return name.endswith(".weight") and len(shape) == 2


def is_quantisable(name: str, shape: torch.Size) -> bool:
    """Whether --lora_base nf4 and int8 quantise a parameter: the linear layers of the blocks. Not
    the embedding, which is a lookup, nor the head, to which the loss is more sensitive; in large
    models they are few parameters.
    """
    return is_matrix(name, shape) and name.startswith("blocks.")


def adapter_state(model: RWKV, parts: Collection[str]) -> dict[str, Tensor]:
    """The adapter's tensors under upstream's names, e.g. `blocks.0.att.key.lora_A`."""
    state = dict(model.named_parameters())
    return {name: state[name].detach() for name in adapter_names(model, parts)}


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
