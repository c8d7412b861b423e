"""The tensors of a run, by part: number of elements and bytes (rules: rwkv.memory.estimate)."""

import functools

import torch

from rwkv.adapters import lora
from rwkv.kernels import adamw, quant
from rwkv.kernels.head_loss import SLICE, chunk_tokens, row_length
from rwkv.memory.plan import Plan
from rwkv.models import Sizes
from rwkv.models.parts import layer_of
from rwkv.models.rwkv import shapes, unused
from rwkv.models.version import version_of

BLAS = 32 << 20  # a workspace of cuBLAS, which has one for each thread and stream; measured on an H100
LIVE = 10**9  # elements that ZeRO-3 keeps gathered (stage3_max_live_parameters)

Blocks = list[tuple[float, float]]
"""Tensors of equal size: bytes of each, and their number."""


@functools.lru_cache(maxsize=16)
def matrices(s: Sizes) -> dict[str, torch.Size]:
    """The shape of every linear layer, embedding and head, by module name."""
    return {name.removesuffix(".weight"): shape for name, shape in shapes(s).items() if lora.is_matrix(name, shape)}


@functools.lru_cache(maxsize=16)
def total(s: Sizes) -> int:
    """The number of elements of the model, without adapters."""
    return sum(shape.numel() for shape in shapes(s).values())


def trained(p: Plan) -> int:
    """The number of trained elements."""
    return of_adapters(p) + sum(shape.numel() for shape in _fully_trained(p))


def adapted(p: Plan) -> list[torch.Size]:
    """The shape of every matrix that gets an adapter."""
    return _adapted_by(p.sizes, p.parts) if p.lora else []


@functools.lru_cache(maxsize=16)
def _adapted_by(s: Sizes, names: tuple[str, ...]) -> list[torch.Size]:
    found = version_of(s).PARTS
    layers = {layer for name in names for layer in found.layers_of(name)}
    return [shape for name, shape in matrices(s).items() if layer_of(name) in layers]


def of_adapters(p: Plan) -> int:
    """The number of elements of adapters on matrices."""
    return sum(shape.numel() for shape in _adapters(p))


def _adapters(p: Plan) -> list[torch.Size]:
    """The shapes of the tensors of adapters on matrices."""
    found = adapted(p)
    shapes_of = [shape for rows, columns in found for shape in ((p.r, columns), (rows, p.r))]
    return [torch.Size(shape) for shape in shapes_of + [(rows,) for rows, _ in found if p.dora]]


def _fully_trained(p: Plan) -> list[torch.Size]:
    """The shapes of trained tensors, without adapters."""
    if p.lora:
        return _fully_trained_by(p.sizes, p.parts)
    never = unused(p.sizes)
    return [shape for name, shape in shapes(p.sizes).items() if name not in never]


@functools.lru_cache(maxsize=16)
def _fully_trained_by(s: Sizes, names: tuple[str, ...]) -> list[torch.Size]:
    found, never = version_of(s).PARTS, unused(s)
    return [shape for name, shape in shapes(s).items() if name not in never and found.fully_trained(name, names)]


@functools.lru_cache(maxsize=16)
def _hidden(s: Sizes) -> list[torch.Size]:
    """The shape of every linear layer of the blocks."""
    return [shape for name, shape in shapes(s).items() if lora.is_hidden(name, shape)]


@functools.lru_cache(maxsize=16)
def _frozen_low_rank(s: Sizes, names: tuple[str, ...]) -> list[torch.Size]:
    """The shapes of the low-rank matrices of Parts that the parts `names` do not train."""
    found = version_of(s).PARTS
    return [x for name, x in shapes(s).items() if found.is_low_rank(name) and not found.fully_trained(name, names)]


def _quantised(p: Plan) -> list[torch.Size]:
    """The shape of every quantised matrix."""
    return _quantisable(p.sizes) if p.quantised else []


@functools.lru_cache(maxsize=16)
def _quantisable(s: Sizes) -> list[torch.Size]:
    return [shape for name, shape in shapes(s).items() if lora.is_quantisable(name, shape)]


def weights(p: Plan) -> float:
    """Bytes of the weights, with adapters, on a device."""
    everything, adapters, dense = total(p.sizes), of_adapters(p), matrices(p.sizes).values()
    if p.stage:
        return p.e * (everything + adapters) / (p.devices if p.stage == 3 else 1)
    if not p.lora:
        return 4.0 * everything - _saved_by_bf16(p) + _copies(p)
    frozen = sum(shape.numel() for shape in [*dense, *_frozen_low_rank(p.sizes, p.parts)])
    small = _quantised(p)
    weights = p.frozen * (frozen - sum(shape.numel() for shape in small)) + 4 * (everything - frozen + adapters)
    return weights + sum(quant.nbytes(p.quantised, shape) for shape in small)


def _copies(p: Plan) -> int:
    """Bytes of the bf16 copies of linear layers and head."""
    return 2 * sum(shape.numel() for name, shape in matrices(p.sizes).items() if p.copied and name != "emb")


def _saved_by_bf16(p: Plan) -> int:
    """Bytes that matrices in bf16 (adamw8bit) take less than in fp32."""
    return (4 - p.matrix) * sum(shape.numel() for shape in matrices(p.sizes).values())


def gradients(p: Plan) -> float:
    """Bytes of all gradients on a device."""
    if p.stage:
        return p.e * trained(p) / (p.devices if p.stage >= 2 else 1)
    return 4.0 * trained(p) - (0 if p.lora else _saved_by_bf16(p))


def complete_gradients(p: Plan, gradients: float) -> Blocks:
    """The gradients of all trained parameters, `gradients` bytes under DeepSpeed."""
    if p.stage:
        complete: Blocks = [(gradients, 1)]
    elif p.lora:
        complete = [(4.0 * shape.numel(), 1) for shape in [*_adapters(p), *_fully_trained(p)]]
    else:
        never = unused(p.sizes)
        complete = [
            ((p.matrix if lora.is_matrix(name, shape) else 4) * shape.numel(), 1)
            for name, shape in shapes(p.sizes).items()
            if name not in never
        ]
    if p.graph and p.accumulate > 1:  # the graph's, and their sum
        complete = [(size, 2 * count) for size, count in complete]
    return complete


def optimizer(p: Plan) -> float:
    """Bytes of the optimizer state on a device, under DeepSpeed with fp32 master weights."""
    master = 4 * trained(p) if p.stage else 0
    return (_moments(p) + master) / (p.devices if p.stage else 1)


def _moments(p: Plan) -> float:
    """Bytes of the moments of all trained elements."""
    n_trained = trained(p)
    if p.optimizer == "adam":
        return 8.0 * n_trained
    if p.optimizer == "adamw8bit":
        return sum(adamw.state_bytes(shape.numel()) for shape in [*_adapters(p), *_fully_trained(p)])
    if p.optimizer == "muon":
        return 8.0 * n_trained - 4.0 * sum(shape.numel() for shape in _hidden(p.sizes))
    found = [shape for shape in [*_adapters(p), *_fully_trained(p)] if len(shape) == 2]
    rest = n_trained - sum(shape.numel() for shape in found)
    return 4.0 * (sum(map(sum, found)) + rest)


def saved_bytes(p: Plan) -> float:
    """Bytes per token and block saved for the backward pass: those of the model, and r elements per
    adapter, with DoRA also its output before the scaling.
    """
    found = adapted(p)
    width = len(found) * p.r + sum(rows for rows, _ in found) * p.dora
    return version_of(p.sizes).saved_bytes(p.sizes, p.e) + width * p.e / p.sizes.n_layer


def of_block(p: Plan) -> Blocks:
    """`saved_bytes` of a block for all tokens, as one tensor of F elements per token and others of
    D; and the copies of its adapters in bf16 or fp16.
    """
    D, F, N = p.sizes.n_embd, p.sizes.dim_ffn, p.tokens
    copies = p.e * p.r * sum(map(sum, adapted(p))) / p.sizes.n_layer
    return [(p.e * F * N, 1), (p.e * D * N, (saved_bytes(p) - p.e * F) / (p.e * D)), (copies, p.e == 2 and not p.stage)]


def outside_blocks(p: Plan) -> Blocks:
    """Saved outside the blocks: token ids, the inputs of ln0 and ln_out, the gradient that
    head_loss computes.
    """
    D, N, e = p.sizes.n_embd, p.tokens, p.e
    first = max(p.matrix, e) * D + 8
    ln0 = not p.lora or "ln" in p.parts or p.grad_cp
    return [(first * N, ln0), (e * D * N, 2), (24 * N, 1)]


def logits(p: Plan) -> Blocks:
    """Temporary tensors of the loss: a chunk of the logits, and the head's weight and gradient."""
    s, e = p.sizes, p.e
    device = "cuda" if p.gpu else "cpu"
    rows = min(chunk_tokens(s.vocab_size, device), p.tokens)
    chunk, part = rows * row_length(s.vocab_size, device), min(s.vocab_size, SLICE)
    blocks: Blocks = [(e * chunk, 1)]
    if p.matrix != e and not p.stage and not p.copied:
        blocks += [(e * s.vocab_size * s.n_embd, 1)]  # the head's weight in the dtype of matmuls
    if e == 4 and not p.gpu:
        blocks += [(4 * part * rows, 1)]  # oneDNN's output buffer
    if not (p.lora or p.stage) and e == 2:
        # the head's gradient of a chunk in the dtype of matmuls; a CPU also converts it to fp32
        blocks += [
            (e * s.vocab_size * s.n_embd, p.matrix != e),
            (4 * s.vocab_size * s.n_embd, not p.gpu and p.matrix != e),
        ]
    return blocks


def dequantised(p: Plan) -> Blocks:
    """The largest quantised matrix, dense during a matmul; or, for DoRA's norms, in fp32."""
    norms = [4 * shape.numel() for shape in adapted(p) if p.dora and p.quantised]
    sizes = [_of_product(p, shape) if p.quantised == "fp8" else p.e * shape.numel() for shape in _quantised(p)]
    return [(max(sizes + norms, default=0), 1)]


def _of_product(p: Plan, shape: torch.Size) -> int:
    """Temporary bytes of a product in FP8: the matrix by columns, and the input in fp32 and 8 bits.
    On a CPU, torch multiplies in fp32.
    """
    rounded = shape.numel() + 5 * p.tokens * max(shape)
    return rounded if p.gpu else rounded + 4 * (shape.numel() + p.tokens * min(shape))


def backward_workspace(p: Plan) -> Blocks:
    """Temporary tensors in the backward pass of a block: gradients of activations and of a weight,
    recomputed inputs.
    """
    D, F, N, e = p.sizes.n_embd, p.sizes.dim_ffn, p.tokens, p.e
    version = version_of(p.sizes)
    inner = version.backward_bytes(p.sizes, e) * N
    if p.gpu:
        inner = version.gpu_backward_bytes(p.sizes, e, N, p.micro_bsz * p.sequences)
    blocks: Blocks = [(inner, 1), *dequantised(p)]
    return blocks if p.lora else [*blocks, (e * F * N, 1), (e * D * F, 1), (p.matrix * D * F, p.matrix != e)]


def optimizer_workspace(p: Plan) -> Blocks:
    """Temporary tensors of an optimizer step: two of the largest size; none with fused Adam. With
    Muon three of the size of a matrix of the blocks, and two products with its transpose.
    """
    if p.optimizer == "muon":
        e = 2 if p.precision == "bf16" else 4
        largest = max(_hidden(p.sizes), key=torch.Size.numel)
        return [(e * largest.numel(), 3), (e * min(largest) ** 2, 2)]
    if p.stage or p.gpu or p.optimizer.startswith("adam"):
        return []
    if p.lora:
        return [(4.0 * max((p.r * max(shape) for shape in adapted(p)), default=0), 2)]
    return [(4.0 * max(shape.numel() for shape in matrices(p.sizes).values()), 2)]


def buckets(p: Plan) -> Blocks:
    """Buckets of DDP and DeepSpeed, weights that ZeRO-3 gathers, workspaces of cuBLAS."""
    # forward and backward pass; a graph is captured on other streams
    return [(_communication(p), 1), (BLAS, (5 if p.graph else 2) if p.gpu else 0)]


def _communication(p: Plan) -> float:
    """Bytes of the buckets and of gathered weights."""
    n_trained = trained(p)
    if not p.stage:
        ddp = p.devices > 1 or p.strategy.startswith("ddp")
        return float((4 if p.lora else p.matrix) * n_trained) if ddp else 0.0
    bucket = min(p.ds_bucket_mb * 10**6, n_trained) * p.e  # as in ZeroStrategy
    buckets = 2 * bucket if p.stage >= 2 else bucket  # one is filled while the other is reduced
    gathered = min(total(p.sizes), LIVE) * p.e if p.stage == 3 else 0
    return buckets + gathered
