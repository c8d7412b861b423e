"""Predict the memory of a run, part by part, before it starts.

Arithmetic alone, in bytes. Shapes are those of the model (rwkv.models.rwkv.shapes); the rules, each tested against it:

    weights      4 per element (autocast keeps fp32 masters), 2 for frozen matrices stored in bf16; `e` under DeepSpeed
    gradients    4 per trained element, freed after the step; `e` under DeepSpeed; DDP's buckets once more
    optimizer    Adam 8 per trained element, 12 under DeepSpeed (with its fp32 master); Adafactor a row and a column of
                 each matrix
    activations  `saved_bytes` of every block, or its input alone with grad_cp, and what is saved outside the blocks
    logits       one chunk of them (rwkv.kernels.head_loss), the head in the dtype of the matmuls
    workspace    temporary tensors of a pass; for DeepSpeed its buckets and, in stage 3, gathered weights
    heap         on a CPU, freed memory that glibc cannot reuse: a measured share of what does not stay for the run
    process      the libraries: on a CPU what is resident of them after a first step

DeepSpeed shards as in the ZeRO paper (Rajbhandari et al. 2020, arXiv:1910.02054, fig. 1): stage 1 the optimizer, 2 also
the gradients, 3 also the weights; offload moves them to the host. `e` is the matmuls' bytes per element: 2 in bf16 and
fp16, else 4.
"""

from dataclasses import dataclass

import torch

from rwkv.kernels.head_loss import CHUNK_BYTES, SLICE
from rwkv.memory.zero import ZEROS
from rwkv.models import Sizes
from rwkv.models.parts import layer_of
from rwkv.models.rwkv import shapes
from rwkv.models.version import version_of

GB = 10**9
CONTEXT = (
    600 << 20
)  # CUDA context and libraries on a GPU, which torch's allocator does not see. Assumed: no GPU was at hand to measure it
PROCESS = 290 << 20  # a process with torch 1.13.1 and Lightning, with a first step, without a model
LOADED = 20 << 20  # of it comes with the first step: torch's code for it. 16 to 34 MiB were seen
HEAP = 0.5  # of gradients, activations, logits and workspace, with torch 1.13.1 and glibc 2.36; 0.3 to 1.1 were seen
LIVE = 10**9  # numbers that ZeRO-3 keeps gathered (stage3_max_live_parameters)


@dataclass(frozen=True)
class Plan:
    """A run, as far as memory goes. `devices`: over all machines; `gpu`: whether they are GPUs; `per_node`: processes on a machine."""

    sizes: Sizes
    lora: bool = True
    r: int = 8
    parts: tuple[str, ...] = ("att", "ln", "time")
    ctx_len: int = 1024
    micro_bsz: int = 1
    precision: str = "bf16"
    grad_cp: bool = False
    base: str = "auto"
    optimizer: str = "adam"
    strategy: str = "auto"
    devices: int = 1
    per_node: int = 1
    accumulate: int = 1
    ds_bucket_mb: int = 200
    gpu: bool = True
    process: int = PROCESS
    heap: float = HEAP

    @property
    def e(self) -> int:
        """Bytes per element of the matmuls' dtype."""
        return 2 if self.precision in ("bf16", "fp16") else 4

    @property
    def frozen(self) -> int:
        """Bytes per element of a frozen matrix."""
        return 2 if (self.precision if self.base == "auto" else self.base) == "bf16" else 4

    @property
    def layers(self) -> set[str]:
        """Matrices of a block that have adapters."""
        return {layer for part in self.parts for layer in version_of(self.sizes).PARTS.layers_of(part)}

    @property
    def tokens(self) -> int:
        """In a batch of one device."""
        return self.ctx_len * self.micro_bsz

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 without DeepSpeed."""
        return ZEROS[self.strategy].stage if self.strategy in ZEROS else 0

    @property
    def offload(self) -> bool:
        """Whether optimizer (and in stage 3 weights) are on the host."""
        return self.strategy in ZEROS and ZEROS[self.strategy].offload_optimizer


Blocks = list[tuple[float, float]]
"""Tensors: bytes of one, and how many."""
Parts = dict[str, Blocks]


@dataclass
class Estimate:
    """Bytes by part: in each phase of a step, at its peak on each device, and on a machine's host.

    Of a phase's parts all but `process` and `heap` are what torch's allocator holds.
    """

    phase_parts: dict[str, dict[str, int]]
    host: dict[str, int]

    @property
    def phases(self) -> dict[str, int]:
        """The peaks on each device."""
        return {name: sum(parts.values()) for name, parts in self.phase_parts.items()}

    @property
    def device(self) -> dict[str, int]:
        """The parts at the fullest moment."""
        return max(self.phase_parts.values(), key=lambda parts: sum(parts.values()))

    @property
    def tensors(self) -> dict[str, int]:
        """The peaks of the phases, of torch's allocator alone."""
        others = ("process", "heap")
        return {
            name: sum(size for part, size in parts.items() if part not in others)
            for name, parts in self.phase_parts.items()
        }

    @property
    def total(self) -> int:
        """Per device."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """On each machine."""
        return sum(self.host.values())


def matrices(s: Sizes) -> dict[str, torch.Size]:
    """The shape of every matrix of the model, by its module's name."""
    return {name.removesuffix(".weight"): shape for name, shape in shapes(s).items() if len(shape) == 2}


def adapted(p: Plan) -> list[torch.Size]:
    """The shape of every matrix that gets an adapter."""
    wanted = p.layers
    return [shape for name, shape in matrices(p.sizes).items() if p.lora and layer_of(name) in wanted]


def trained(p: Plan) -> int:
    """The number of trained elements."""
    if not p.lora:
        return total(p.sizes)
    parts = version_of(p.sizes).PARTS
    whole = sum(shape.numel() for name, shape in shapes(p.sizes).items() if parts.trained_whole(name, p.parts))
    return whole + sum(p.r * (rows + columns) for rows, columns in adapted(p))


def total(s: Sizes) -> int:
    """The number of elements of the model, without adapters."""
    return sum(shape.numel() for shape in shapes(s).values())


def saved_bytes(p: Plan) -> float:
    """Bytes per token and block that stay until the backward pass: those of the version, and of adapters r elements each."""
    return version_of(p.sizes).saved_bytes(p.sizes, p.e) + len(adapted(p)) * p.r * p.e / p.sizes.n_layer


def _block(p: Plan) -> Blocks:
    """What `kept` says, for all tokens: one tensor of F numbers a token, the rest of D."""
    D, F, N = p.sizes.n_embd, p.sizes.dim_ffn, p.tokens
    return [(p.e * F * N, 1), (p.e * D * N, (saved_bytes(p) - p.e * F) / (p.e * D))]


def _outside(p: Plan) -> Blocks:
    """Saved outside the blocks: ids, the inputs of ln0 and ln_out, the gradient that head_loss computes."""
    D, N, e = p.sizes.n_embd, p.tokens, p.e
    first = (4 if not p.lora else p.frozen) * D + 8
    ln0 = not p.lora or "ln" in p.parts or p.grad_cp
    return [(first * N, ln0), (e * D * N, 2), (24 * N, 1)]


def _per_node(p: Plan) -> int:
    return max(1, min(p.devices, p.per_node))


def estimate(p: Plan) -> Estimate:
    """What the run takes on a device and on a host."""
    s, e, n = p.sizes, p.e, p.devices
    numbers, learns = total(s), trained(p)
    adapters = sum(p.r * (rows + columns) for rows, columns in adapted(p))
    zero, share = p.stage, n if p.stage else 1
    if zero:
        weights = e * (numbers + adapters) / (share if zero == 3 else 1)
        gradients = e * learns / (share if zero >= 2 else 1)
    elif p.lora:
        whole = sum(shape.numel() for shape in matrices(s).values())
        weights = p.frozen * whole + 4 * (numbers - whole + adapters)
        gradients = 4.0 * learns
    else:
        weights, gradients = 4.0 * numbers, 4.0 * learns
    optimizer = _optimizer(p, learns) / share
    if zero:
        optimizer += 4 * learns / share  # the fp32 master
    host: dict[str, float] = {}
    if p.offload:
        host["optimizer"] = (optimizer + 4 * learns / share) * _per_node(p)  # gradients arrive in fp32
        optimizer = 0.0
        if zero >= 2:
            gradients = 0.0
        if zero == 3:
            host["weights"] = weights * _per_node(p)
            weights = 0.0
    buckets: Blocks = [(_buckets(p, numbers, learns), 1)]
    grown: Blocks = [(gradients, 1)] if zero else [(4.0, learns)]
    if not (p.lora or zero):
        grown = [(4.0 * shape.numel(), 1) for shape in shapes(s).values()]
    head: Blocks = (
        [] if p.lora else [((e if zero else 4.0) * s.vocab_size * s.n_embd, 1)]
    )  # its gradient is formed in the forward pass
    held = head + (grown if p.accumulate > 1 or zero >= 2 else [])
    block, outer, passing = _block(p), _outside(p), _passing(p)
    # With grad_cp the input of the first block is what ln0 keeps anyway.
    inside = (
        [(e * s.n_embd * p.tokens, s.n_layer - 1)]
        if p.grad_cp
        else [(size, count * s.n_layer) for size, count in block]
    )
    again = block if p.grad_cp else []
    states: Parts = {
        "weights": [(weights, 1)],
        "gradients": [],
        "optimizer": [(optimizer, 1)],
        "activations": [],
        "logits": [],
    }
    phases: dict[str, Parts] = {
        "forward": {
            **states,
            "gradients": held,
            "activations": inside + outer,
            "logits": _logits(p),
            "workspace": buckets,
        },
        "backward": {
            **states,
            "gradients": held,
            "activations": inside + outer + again,
            "workspace": passing + buckets,
        },
        "its end": {**states, "gradients": grown, "activations": outer + block, "workspace": passing + buckets},
        "optimizer": {**states, "gradients": grown, "workspace": _stepping(p) + buckets},
    }
    made = {
        name: {part: sum(size * count for size, count in blocks) for part, blocks in parts.items()}
        for name, parts in phases.items()
    }
    made["backward"] = max(made["backward"], made.pop("its end"), key=lambda parts: sum(parts.values()))
    if not p.gpu:
        for parts in made.values():
            parts["heap"] = p.heap * sum(size for part, size in parts.items() if part not in ("weights", "optimizer"))
    phase_parts = {name: _round(parts | {"process": CONTEXT if p.gpu else p.process}) for name, parts in made.items()}
    if p.gpu:
        loading = 4 * (numbers + adapters) * _per_node(p)  # a process reads the model before it goes to its GPU
        host = {"process": p.process * _per_node(p), "loading": max(0.0, loading - sum(host.values()))} | host
    else:
        device = Estimate(phase_parts, {}).device
        host = {name: host.get(name, 0) + value * _per_node(p) for name, value in device.items()}
    return Estimate(phase_parts, _round(host))


def _round(parts: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in parts.items()}


def _optimizer(p: Plan, learns: int) -> float:
    if p.optimizer == "adam":
        return 8.0 * learns
    if p.lora:
        found = [torch.Size(shape) for rows, columns in adapted(p) for shape in ((p.r, columns), (rows, p.r))]
    else:
        found = list(matrices(p.sizes).values())
    rest = learns - sum(shape.numel() for shape in found)
    return 4.0 * (sum(map(sum, found)) + rest)


def _logits(p: Plan) -> Blocks:
    s, e = p.sizes, p.e
    rows = min(max(1, CHUNK_BYTES // (4 * s.vocab_size)), p.tokens)
    chunk, part = rows * s.vocab_size, min(s.vocab_size, SLICE)
    blocks: Blocks = [(e * chunk, 1)]
    if (p.frozen if p.lora else 4) != e and not p.stage:
        blocks += [(e * s.vocab_size * s.n_embd, 1)]  # the head in the products' dtype
    if e == 4 and not p.gpu:
        blocks += [(4 * part * rows, 1)]  # oneDNN's result, where it takes the product
    if (
        not (p.lora or p.stage) and e == 2
    ):  # a chunk's share of the head's gradient, which is fp32, in the products' dtype; a CPU converts it first
        blocks += [(e * s.vocab_size * s.n_embd, 1), (4 * s.vocab_size * s.n_embd, not p.gpu)]
    return blocks


def _passing(p: Plan) -> Blocks:
    """What comes and goes in the backward pass of a block: gradients of its tensors, recomputed inputs, and a weight's."""
    D, F, N, e = p.sizes.n_embd, p.sizes.dim_ffn, p.tokens, p.e
    blocks: Blocks = [(e * D * N, 3), (e * F * N, 1 if p.lora else 2)]
    return blocks if p.lora else [*blocks, (e * D * F, 1), (4 * D * F, 1)]


def _stepping(p: Plan) -> Blocks:
    """What an optimizer step takes for a while: two tensors like the largest; nothing where Adam is one pass."""
    if p.stage or p.gpu or p.optimizer == "adam":
        return []
    if p.lora:
        return [(4.0 * max((p.r * max(shape) for shape in adapted(p)), default=0), 2)]
    return [(4.0 * max(shape.numel() for shape in matrices(p.sizes).values()), 2)]


def _buckets(p: Plan, numbers: int, learns: int) -> float:
    if not p.stage:
        ddp = p.devices > 1 or p.strategy.startswith("ddp")
        return 4.0 * learns if ddp else 0.0
    bucket = min(p.ds_bucket_mb * 10**6, learns) * p.e  # as ZeroStrategy makes it
    sent = 2 * bucket if p.stage >= 2 else bucket  # two, while one is sent
    gathered = min(numbers, LIVE) * p.e if p.stage == 3 else 0
    return sent + gathered
