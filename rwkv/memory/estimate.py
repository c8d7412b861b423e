"""Predict the memory usage of a run, by part, from its flags.

All sizes are in bytes. Shapes are those of the model (rwkv.models.rwkv.shapes). The rules:

    weights      4 per element (autocast keeps fp32 masters), 2 for frozen matrices stored in bf16
                 (also RWKV-7's low-rank ones), 0.52 in nf4, 1 in int8; `e` under DeepSpeed
    gradients    4 per trained element, freed after the step; `e` under DeepSpeed; twice with DDP
                 (its buckets)
    optimizer    Adam 8 per trained element, 12 under DeepSpeed (with its fp32 master); Adafactor a
                 row and a column of each matrix; adamw8bit 2.03, and matrices and their gradients
                 are bf16. With release_grads only one gradient at a time is in memory. Muon 4 for
                 linear layers of the blocks, 8 for others
    activations  `saved_bytes` of every block, or only its input with grad_cp; and those saved
                 outside the blocks
    logits       one chunk (rwkv.kernels.head_loss), and the head's weight in the dtype of matmuls
    workspace    temporary tensors of a pass, with a dequantised matrix and on GPUs the workspace of
                 WKV; DeepSpeed's buckets and, in stage 3, gathered weights
    heap         on a CPU, freed memory that glibc cannot reuse: HEAP of the activations of all
                 blocks, with grad_cp too, and of the workspace (docs/decisions/012)
    process      the libraries: on a CPU, their resident size after the first step

DeepSpeed shards as in the ZeRO paper (Rajbhandari et al. 2020, arXiv:1910.02054, fig. 1): stage 1
the optimizer, 2 also the gradients, 3 also the weights; offload moves them to the host. `e` is the
number of bytes per element in matmuls: 2 in bf16 and fp16, else 4.
"""

import torch

from rwkv.adapters import lora
from rwkv.kernels import adamw, quant
from rwkv.kernels.head_loss import SLICE, chunk_tokens
from rwkv.memory.result import Estimate
from rwkv.memory.settings import Plan
from rwkv.models import Sizes
from rwkv.models.parts import layer_of
from rwkv.models.rwkv import shapes, unused
from rwkv.models.version import version_of

GB = 10**9
# CUDA context and libraries on a GPU, which torch's allocator does not report. This value is an
# assumption, not a measurement.
CONTEXT = 600 << 20
BLAS = 32 << 20  # a workspace of cuBLAS, which has one for each thread and stream; measured on an H100
LOADED = 20 << 20  # part of Plan.process that torch loads in the first step; measured 16 to 34 MiB
HEAP = 0.9  # of all blocks' activations and the workspace; glibc 2.36, both stacks: measured 0.6 to 1.2
LIVE = 10**9  # elements that ZeRO-3 keeps gathered (stage3_max_live_parameters)

_PARTS_OF_PHASES = (
    ("forward", "last block"),
    *(("backward", part) for part in ("start of backward", "end of backward", "head")),
)

Blocks = list[tuple[float, float]]
"""Tensors of equal size: bytes of each, and their number."""
Parts = dict[str, Blocks]


def matrices(s: Sizes) -> dict[str, torch.Size]:
    """The shape of every linear layer, embedding and head, by module name."""
    return {name.removesuffix(".weight"): shape for name, shape in shapes(s).items() if lora.is_matrix(name, shape)}


def adapted(p: Plan) -> list[torch.Size]:
    """The shape of every matrix that gets an adapter."""
    wanted = p.layers
    return [shape for name, shape in matrices(p.sizes).items() if p.lora and layer_of(name) in wanted]


def trained(p: Plan) -> int:
    """The number of trained elements."""
    return _of_adapters(p) + sum(shape.numel() for shape in _fully_trained(p))


def _of_adapters(p: Plan) -> int:
    """The number of elements of adapters on matrices."""
    return sum(shape.numel() for shape in _adapters(p))


def _adapters(p: Plan) -> list[torch.Size]:
    """The shapes of the tensors of adapters on matrices."""
    found = adapted(p)
    shapes_of = [shape for rows, columns in found for shape in ((p.r, columns), (rows, p.r))]
    return [torch.Size(shape) for shape in shapes_of + [(rows,) for rows, _ in found if p.dora]]


def _fully_trained(p: Plan) -> list[torch.Size]:
    """The shapes of trained tensors, without adapters."""
    parts, never = version_of(p.sizes).PARTS, unused(p.sizes)
    return [
        shape
        for name, shape in shapes(p.sizes).items()
        if name not in never and (not p.lora or parts.fully_trained(name, p.parts))
    ]


def _hidden(p: Plan) -> list[torch.Size]:
    """The shape of every linear layer of the blocks."""
    return [shape for name, shape in shapes(p.sizes).items() if lora.is_hidden(name, shape)]


def _frozen_low_rank(p: Plan) -> list[torch.Size]:
    """The shapes of RWKV-7's low-rank matrices, if they are frozen."""
    parts = version_of(p.sizes).PARTS
    return [
        s for name, s in shapes(p.sizes).items() if lora.is_low_rank(name) and not parts.fully_trained(name, p.parts)
    ]


def total(s: Sizes) -> int:
    """The number of elements of the model, without adapters."""
    return sum(shape.numel() for shape in shapes(s).values())


def saved_bytes(p: Plan) -> float:
    """Bytes per token and block saved for the backward pass: those of the model, and r elements per
    adapter, with DoRA also its output before the scaling.
    """
    found = adapted(p)
    width = len(found) * p.r + sum(rows for rows, _ in found) * p.dora
    return version_of(p.sizes).saved_bytes(p.sizes, p.e) + width * p.e / p.sizes.n_layer


def _block(p: Plan) -> Blocks:
    """`saved_bytes` of a block for all tokens, as one tensor of F elements per token and others of
    D.
    """
    D, F, N = p.sizes.n_embd, p.sizes.dim_ffn, p.tokens
    return [(p.e * F * N, 1), (p.e * D * N, (saved_bytes(p) - p.e * F) / (p.e * D))]


def _outside(p: Plan) -> Blocks:
    """Saved outside the blocks: token ids, the inputs of ln0 and ln_out, the gradient that
    head_loss computes.
    """
    D, N, e = p.sizes.n_embd, p.tokens, p.e
    first = max(p.matrix, e) * D + 8
    ln0 = not p.lora or "ln" in p.parts or p.grad_cp
    return [(first * N, ln0), (e * D * N, 2), (24 * N, 1)]


def _quantised(p: Plan) -> list[torch.Size]:
    """The shape of every quantised matrix."""
    return [shape for name, shape in shapes(p.sizes).items() if p.quantised and lora.is_quantisable(name, shape)]


def _dequantised(p: Plan) -> Blocks:
    """The largest quantised matrix, dense during a matmul; or, for DoRA's norms, in fp32."""
    norms = [4 * shape.numel() for shape in adapted(p) if p.dora and p.quantised]
    return [(max([p.e * shape.numel() for shape in _quantised(p)] + norms, default=0), 1)]


def _per_node(p: Plan) -> int:
    return max(1, min(p.devices, p.per_node))


def estimate(p: Plan) -> Estimate:
    """Estimate the memory usage of a run, per device and per host."""
    s, e, n = p.sizes, p.e, p.devices
    n_elements, n_trained = total(s), trained(p)
    adapters = _of_adapters(p)
    zero, share = p.stage, n if p.stage else 1
    if zero:
        weights = e * (n_elements + adapters) / (share if zero == 3 else 1)
        gradients = e * n_trained / (share if zero >= 2 else 1)
    elif p.lora:
        whole = sum(shape.numel() for shape in [*matrices(s).values(), *_frozen_low_rank(p)])
        small = _quantised(p)
        weights = p.frozen * (whole - sum(shape.numel() for shape in small)) + 4 * (n_elements - whole + adapters)
        weights += sum(quant.nbytes(p.quantised, shape) for shape in small)
        gradients = 4.0 * n_trained
    else:
        narrow = (4 - p.matrix) * sum(shape.numel() for shape in matrices(s).values())
        weights, gradients = 4.0 * n_elements - narrow, 4.0 * n_trained - narrow
    optimizer = _optimizer(p, n_trained) / share
    if zero:
        optimizer += 4 * n_trained / share  # the fp32 master
    host: dict[str, float] = {}
    if p.offload:
        host["optimizer"] = (optimizer + 4 * n_trained / share) * _per_node(p)  # gradients arrive in fp32
        optimizer = 0.0
        if zero >= 2:
            gradients = 0.0
        if zero == 3:
            host["weights"] = weights * _per_node(p)
            weights = 0.0
    buckets: Blocks = [(_buckets(p, n_elements, n_trained), 1)]
    if p.gpu:  # forward and backward pass; a graph is captured on other streams
        buckets += [(BLAS, 5 if p.graph else 2)]
    complete: Blocks = [(gradients, 1)]
    if p.lora and not zero:
        complete = [(4.0 * shape.numel(), 1) for shape in [*_adapters(p), *_fully_trained(p)]]
    if not (p.lora or zero):
        bytes_of = {name: p.matrix if lora.is_matrix(name, shape) else 4 for name, shape in shapes(s).items()}
        never = unused(s)
        complete = [(bytes_of[name] * shape.numel(), 1) for name, shape in shapes(s).items() if name not in never]
    # the head's gradient is computed in the forward pass
    head: Blocks = [] if p.lora else [((e if zero else p.matrix) * s.vocab_size * s.n_embd, 1)]
    if p.graph and p.accumulate > 1:  # the graph's, and their sum
        complete = [(size, 2 * count) for size, count in complete]
    accumulated = complete if p.graph or p.accumulate > 1 or zero >= 2 else []
    partial = head + accumulated
    block, outer, temporary = _block(p), _outside(p), _backward_workspace(p)
    # with grad_cp the input of the first block is saved by ln0 anyway
    inside = (
        [(e * s.n_embd * p.tokens, s.n_layer - 1)]
        if p.grad_cp
        else [(size, count * s.n_layer) for size, count in block]
    )
    recomputed = block if p.grad_cp else []
    persistent: Parts = {
        "weights": [(weights, 1)],
        "gradients": [],
        "optimizer": [(optimizer, 1)],
        "activations": [],
        "logits": [],
    }
    phases: dict[str, Parts] = {
        "last block": {
            **persistent,
            "gradients": accumulated,
            "activations": inside + outer,
            "workspace": [*buckets, (version_of(s).forward_bytes(s, e) * p.tokens, p.grad_cp), *_dequantised(p)],
        },
        "forward": {
            **persistent,
            "gradients": partial,
            "activations": inside + outer,
            "logits": _logits(p),
            "workspace": buckets,
        },
        "backward": {
            **persistent,
            "gradients": partial,
            "activations": inside + outer + recomputed,
            "workspace": temporary + buckets,
        },
        "end of backward": {
            **persistent,
            "gradients": complete,
            "activations": outer + block,
            "workspace": temporary + buckets,
        },
        "optimizer": {
            **persistent,
            "gradients": complete,
            "workspace": _optimizer_workspace(p) + buckets,
        },
    }
    if p.release_grads:
        # the head's is freed first, those of a block are in the workspace, the embedding's is last
        phases["start of backward"] = phases["forward"] | {"logits": []}
        last: Blocks = [(max(size for size, _ in complete), 1)]
        phases["backward"]["gradients"] = last if p.lora else []
        phases["end of backward"] = {**persistent, "gradients": last, "activations": outer, "workspace": buckets}
        phases["optimizer"]["gradients"] = []
    if p.sequences > 1:  # the loss of pairs computes the gradients of the head in the backward pass
        phases["head"] = phases["forward"] | {"workspace": [*buckets, (e * s.n_embd * p.tokens, 1)]}
        phases["forward"] = phases["forward"] | {"gradients": accumulated}
    if p.graph:  # its activations, temporary tensors and gradients
        captured = phases["backward"]
        for phase in phases.values():
            phase |= {"activations": captured["activations"], "workspace": temporary + buckets}
        phases["optimizer"]["workspace"] = phases["optimizer"]["workspace"] + _optimizer_workspace(p)
    peaks = {
        name: {part: sum(size * count for size, count in blocks) for part, blocks in parts.items()}
        for name, parts in phases.items()
    }
    for name, other in _PARTS_OF_PHASES:
        if other not in peaks:
            continue
        peaks[name] = max((peaks[name], peaks.pop(other)), key=lambda parts: sum(parts.values()))
    if not p.gpu:
        heap = HEAP * (
            s.n_layer * sum(size * count for size, count in block) + sum(x * count for x, count in temporary)
        )
        for parts in peaks.values():
            parts["heap"] = heap
    phase_parts = {name: _round(parts | {"process": CONTEXT if p.gpu else p.process}) for name, parts in peaks.items()}
    if p.gpu:
        # each process loads the model to the host first
        converted = p.quantised or (p.optimizer == "adamw8bit" and not p.lora)
        loading = (weights if converted else 4 * (n_elements + adapters)) * _per_node(p)
        host = {"process": p.process * _per_node(p), "loading": max(0.0, loading - sum(host.values()))} | host
    else:
        device = Estimate(phase_parts, {}).device
        host = {name: host.get(name, 0) + value * _per_node(p) for name, value in device.items()}
    return Estimate(phase_parts, _round(host))


def _round(parts: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in parts.items()}


def _optimizer(p: Plan, n_trained: int) -> float:
    if p.optimizer == "adam":
        return 8.0 * n_trained
    if p.optimizer == "adamw8bit":
        return sum(adamw.state_bytes(shape.numel()) for shape in [*_adapters(p), *_fully_trained(p)])
    if p.optimizer == "muon":
        return 8.0 * n_trained - 4.0 * sum(shape.numel() for shape in _hidden(p))
    found = [shape for shape in [*_adapters(p), *_fully_trained(p)] if len(shape) == 2]
    rest = n_trained - sum(shape.numel() for shape in found)
    return 4.0 * (sum(map(sum, found)) + rest)


def _logits(p: Plan) -> Blocks:
    s, e = p.sizes, p.e
    rows = min(chunk_tokens(s.vocab_size, "cuda" if p.gpu else "cpu"), p.tokens)
    chunk, part = rows * s.vocab_size, min(s.vocab_size, SLICE)
    blocks: Blocks = [(e * chunk, 1)]
    if p.matrix != e and not p.stage:
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


def _backward_workspace(p: Plan) -> Blocks:
    """Temporary tensors in the backward pass of a block: gradients of activations and of a weight,
    recomputed inputs.
    """
    D, F, N, e = p.sizes.n_embd, p.sizes.dim_ffn, p.tokens, p.e
    version = version_of(p.sizes)
    inner = version.backward_bytes(p.sizes, e) * N
    if p.gpu:
        inner = version.gpu_backward_bytes(p.sizes, e, N, p.micro_bsz * p.sequences)
    blocks: Blocks = [(inner, 1), *_dequantised(p)]
    return blocks if p.lora else [*blocks, (e * F * N, 1), (e * D * F, 1), (p.matrix * D * F, p.matrix != e)]


def _optimizer_workspace(p: Plan) -> Blocks:
    """Temporary tensors of an optimizer step: two of the largest size; none with fused Adam. With
    Muon three of the size of a matrix of the blocks, and two products with its transpose.
    """
    if p.optimizer == "muon":
        e = 2 if p.precision == "bf16" else 4
        largest = max(_hidden(p), key=torch.Size.numel)
        return [(e * largest.numel(), 3), (e * min(largest) ** 2, 2)]
    if p.stage or p.gpu or p.optimizer.startswith("adam"):
        return []
    if p.lora:
        return [(4.0 * max((p.r * max(shape) for shape in adapted(p)), default=0), 2)]
    return [(4.0 * max(shape.numel() for shape in matrices(p.sizes).values()), 2)]


def _buckets(p: Plan, n_elements: int, n_trained: int) -> float:
    if not p.stage:
        ddp = p.devices > 1 or p.strategy.startswith("ddp")
        size = 4 if p.lora else p.matrix
        return float(size * n_trained) if ddp else 0.0
    bucket = min(p.ds_bucket_mb * 10**6, n_trained) * p.e  # as in ZeroStrategy
    buckets = 2 * bucket if p.stage >= 2 else bucket  # one is filled while the other is reduced
    gathered = min(n_elements, LIVE) * p.e if p.stage == 3 else 0
    return buckets + gathered
