"""Predict the memory usage of a run, by part, from its flags.

All sizes are in bytes. Shapes are those of the model (rwkv.models.rwkv.shapes). The rules:

    weights      4 per element (autocast keeps fp32 masters), 2 for frozen matrices stored in bf16
                 (also RWKV-7's low-rank ones), 0.52 in nf4, 1 in int8 and fp8; `e` under DeepSpeed.
                 With bf16_copies 6 for trained linear layers and head
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
    process      the libraries: on a CPU, their resident size after the first step; the World
                 tokenizer, if it encodes the questions of --sample_ask

DeepSpeed shards as in the ZeRO paper (Rajbhandari et al. 2020, arXiv:1910.02054, fig. 1): stage 1
the optimizer, 2 also the gradients, 3 also the weights; offload moves them to the host. `e` is the
number of bytes per element in matmuls: 2 in bf16 and fp16, else 4.
"""

from rwkv.memory import parts
from rwkv.memory.parts import Blocks
from rwkv.memory.plan import Plan
from rwkv.memory.result import Estimate
from rwkv.models.version import version_of

GB = 10**9
# CUDA context and libraries on a GPU, which torch's allocator does not report. This value is an
# assumption, not a measurement.
CONTEXT = 600 << 20
LOADED = 20 << 20  # part of Plan.process that torch loads in the first step; measured 16 to 34 MiB
HEAP = 0.9  # of all blocks' activations and the workspace; glibc 2.36, both stacks: measured 0.6 to 1.2

_PARTS_OF_PHASES = (
    ("forward", "last block"),
    *(("backward", part) for part in ("start of backward", "end of backward", "head")),
)
Parts = dict[str, Blocks]


def estimate(p: Plan) -> Estimate:
    """Estimate the memory usage of a run, per device and per host."""
    stored = {"weights": parts.weights(p), "gradients": parts.gradients(p), "optimizer": parts.optimizer(p)}
    stored, offloaded = _offload(p, stored)
    phase_parts = {name: _round(sizes) for name, sizes in _peaks(p, _phases(p, stored)).items()}
    return Estimate(phase_parts, _round(_on_host(p, stored, offloaded, phase_parts)))


def _offload(p: Plan, stored: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """What remains of `stored` on a device, and what DeepSpeed moves to the host, in bytes."""
    if not p.offload:
        return stored, {}
    # gradients arrive in fp32
    host = {"optimizer": stored["optimizer"] + 4 * parts.trained(p) / p.devices}
    moved = {"optimizer"} | ({"gradients"} if p.stage >= 2 else set())
    if p.stage == 3:
        host["weights"] = stored["weights"]
        moved.add("weights")
    rest = {name: 0.0 if name in moved else size for name, size in stored.items()}
    return rest, {name: size * _per_node(p) for name, size in host.items()}


def _phases(p: Plan, stored: dict[str, float]) -> dict[str, Parts]:
    """Tensors on a device in each phase of a step; in some phases at two moments."""
    s, e = p.sizes, p.e
    buckets, temporary = parts.buckets(p), parts.backward_workspace(p)
    complete = parts.complete_gradients(p, stored["gradients"])
    accumulated = complete if p.graph or p.accumulate > 1 or p.stage >= 2 else []
    # the head's gradient is computed in the forward pass
    head: Blocks = [] if p.lora else [((e if p.stage else p.matrix) * s.vocab_size * s.n_embd, 1)]
    partial = head + accumulated
    block, outer = parts.of_block(p), parts.outside_blocks(p)
    recomputed = block if p.grad_cp else []
    inside = [(size, count * s.n_layer) for size, count in block]
    if p.grad_cp:  # ln0 saves the input of the first block anyway
        inside = [(e * s.n_embd * p.tokens, s.n_layer - 1)]
    persistent: Parts = {
        "weights": [(stored["weights"], 1)],
        "gradients": [],
        "optimizer": [(stored["optimizer"], 1)],
        "activations": [],
        "logits": [],
    }
    phases: dict[str, Parts] = {
        "last block": {
            **persistent,
            "gradients": accumulated,
            "activations": inside + outer,
            "workspace": [*buckets, (version_of(s).forward_bytes(s, e) * p.tokens, p.grad_cp), *parts.dequantised(p)],
        },
        "forward": {
            **persistent,
            "gradients": partial,
            "activations": inside + outer,
            "logits": parts.logits(p),
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
            "workspace": parts.optimizer_workspace(p) + buckets,
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
        phases["optimizer"]["workspace"] = phases["optimizer"]["workspace"] + parts.optimizer_workspace(p)
    return phases


def _peaks(p: Plan, phases: dict[str, Parts]) -> dict[str, dict[str, float]]:
    """Bytes by part at the peak of each phase, with the heap and the process."""
    peaks = {
        name: {part: sum(size * count for size, count in blocks) for part, blocks in phase.items()}
        for name, phase in phases.items()
    }
    for name, other in _PARTS_OF_PHASES:
        if other in peaks:
            peaks[name] = max((peaks[name], peaks.pop(other)), key=lambda sizes: sum(sizes.values()))
    if p.gpu:
        return {name: sizes | {"process": CONTEXT} for name, sizes in peaks.items()}
    activations = p.sizes.n_layer * sum(size * count for size, count in parts.of_block(p))
    heap = HEAP * (activations + sum(size * count for size, count in parts.backward_workspace(p)))
    return {name: sizes | {"heap": heap, "process": p.process + p.encoder} for name, sizes in peaks.items()}


def _on_host(
    p: Plan, stored: dict[str, float], offloaded: dict[str, float], phase_parts: dict[str, dict[str, int]]
) -> dict[str, float]:
    """Bytes by part in host memory."""
    if not p.gpu:
        device = Estimate(phase_parts, {}).device
        return {name: offloaded.get(name, 0) + size * _per_node(p) for name, size in device.items()}
    # each process loads the model to the host first
    narrow = p.quantised or (p.optimizer == "adamw8bit" and not p.lora)
    loading = (stored["weights"] if narrow else 4 * (parts.total(p.sizes) + parts.of_adapters(p))) * _per_node(p)
    process = (p.process + p.encoder) * _per_node(p)
    return {"process": process, "loading": max(0.0, loading - sum(offloaded.values()))} | offloaded


def _per_node(p: Plan) -> int:
    return max(1, min(p.devices, p.per_node))


def _round(sizes: dict[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in sizes.items()}
