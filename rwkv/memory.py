"""What a run keeps in memory, part by part, before it runs; what fits on a card, and the cheapest change that would.

Arithmetic alone, in bytes. The rules, each held against the real model (tests/test_memory.py):

    weights      4 bytes a number (autocast keeps masters), 2 where the matrices that LoRA freezes are kept in bf16; `e` under DeepSpeed
    gradients    4 a trained number, let go after the step; `e` under DeepSpeed; DDP has its buckets once more
    optimizer    Adam 8 a trained number, 12 under DeepSpeed (with its fp32 master); Adafactor a row and a column for each matrix
    activations  what `kept` says of every block, the inputs alone with grad_cp, and what lies outside the blocks
    logits       one chunk of them (rwkv.model.loss), the head in the dtype of the products
    workspace    what comes and goes inside a pass; for DeepSpeed its buckets and, in stage 3, the weights that are gathered

DeepSpeed's partition is that of the ZeRO paper (Rajbhandari et al. 2020, arXiv:1910.02054, fig. 1): stage 1 shares out the optimizer, 2 also the
gradients, 3 also the weights; offload moves them to the host. `e` is what products are computed in: 2 in bf16 and fp16, else 4.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rwkv.lora import layers_of
from rwkv.model import Sizes
from rwkv.model.loss import CHUNK_BYTES, SLICE

GB = 10**9
GUIDE = {"1.5b": 15, "3b": 24, "7b": 48, "14b": 80}
"""GB that the community's guide says full tuning takes, by size; less than half of it with LoRA and DeepSpeed."""
MODELS = {"0.1b": (12, 768), "0.4b": (24, 1024), "1.5b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096), "14b": (40, 5120)}
"""Layers and width of the published RWKV-4 models."""
CONTEXT = 600 << 20  # CUDA context and libraries on a GPU, which torch's allocator does not see. Assumed: no GPU was at hand to measure it
PROCESS = 330 << 20  # a process with torch and Lightning, before any model (LOG.md)
STRATEGIES = (
    "auto",
    "ddp",
    "ddp_find_unused_parameters_false",
    "deepspeed",
    *(f"deepspeed_stage_{n}{o}" for n in (1, 2, 3) for o in ("", "_offload")),
)
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

    @property
    def e(self) -> int:
        """Bytes of a number that products are computed in."""
        return 2 if self.precision in ("bf16", "fp16") else 4

    @property
    def frozen(self) -> int:
        """Bytes of a number of a frozen matrix."""
        return 2 if (self.precision if self.base == "auto" else self.base) == "bf16" else 4

    @property
    def layers(self) -> set[str]:
        """Matrices of a block that have adapters."""
        return {layer for part in self.parts for layer in layers_of(part)}

    @property
    def tokens(self) -> int:
        """In a batch of one device."""
        return self.ctx_len * self.micro_bsz

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 without DeepSpeed."""
        return 0 if not self.strategy.startswith("deepspeed") else int((self.strategy + "_2").split("stage_")[-1][0])

    @property
    def offload(self) -> bool:
        """Whether optimizer (and in stage 3 weights) are on the host."""
        return self.strategy.endswith("offload")


@dataclass
class Estimate:
    """Bytes by part, on each device at its fullest moment and on a machine's host, and the peaks of the phases of a step."""

    device: dict[str, int]
    host: dict[str, int]
    phases: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Per device."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """On each machine."""
        return sum(self.host.values())


def sizes_of(name: str) -> Sizes:
    """A published model, e.g. "1.5b", with World's vocabulary. Raises KeyError."""
    layers, width = MODELS[name.lower()]
    return Sizes(layers, width, 65536, width, 4 * width)


def matrices(s: Sizes) -> list[tuple[str, int, int]]:
    """Name, rows and columns of every matrix of the model."""
    D, A, F = s.n_embd, s.dim_att, s.dim_ffn
    found = [("emb", s.vocab_size, D), ("head", s.vocab_size, D)]
    for layer in range(s.n_layer):
        mixes = ("ffnPre", "ffn") if layer == 0 and s.pre_ffn else ("ffn",)
        found += [
            (f"{mix}.{name}", *shape) for mix in mixes for name, shape in (("key", (F, D)), ("receptance", (D, D)), ("value", (D, F)))
        ]
        if "ffnPre" not in mixes:
            found += [(f"att.{name}", A, D) for name in ("key", "value", "receptance")] + [("att.output", D, A)]
    return found


def vectors(s: Sizes) -> dict[str, int]:
    """Numbers of all vectors: `time` parameters, block LayerNorms `ln`, `ln_out`."""
    D, A, L = s.n_embd, s.dim_att, s.n_layer
    att = L - bool(s.pre_ffn)
    return {"time": att * (2 * A + 3 * D) + (2 * L - att) * 2 * D, "ln": 4 * D * L + 2 * D, "ln_out": 2 * D}


def adapted(p: Plan) -> list[tuple[int, int]]:
    """Rows and columns of every matrix that gets an adapter."""
    wanted = p.layers
    return [(rows, columns) for name, rows, columns in matrices(p.sizes) if p.lora and name.replace("Pre", "") in wanted]


def trained(p: Plan) -> int:
    """Trained numbers."""
    if not p.lora:
        return total(p.sizes)
    small = vectors(p.sizes)
    return sum(p.r * (rows + columns) for rows, columns in adapted(p)) + sum(small[part] for part in p.parts if part in small)


def total(s: Sizes) -> int:
    """Numbers of the model, without adapters."""
    return sum(rows * columns for _, rows, columns in matrices(s)) + sum(vectors(s).values())


def kept(p: Plan) -> float:
    """Bytes a token and block that stay until the backward pass. The one place where this is stated; the reasons are in rwkv/model/v4.py."""
    D, A, F, e = p.sizes.n_embd, p.sizes.dim_att, p.sizes.dim_ffn, p.e
    mixes = not p.lora or "time" in p.parts
    att, ffn = (
        ("att" in {layer[:3] for layer in p.layers - {"att.output"}}, bool({"ffn.key", "ffn.receptance"} & p.layers))
        if p.lora
        else (True, True)
    )
    low = sum(p.r * e for _ in adapted(p)) / p.sizes.n_layer
    norms = 2 + (mixes or att) + (mixes or ffn)  # their inputs, and their outputs, which the recipes of products need
    return (norms + 2) * e * D + (4 * e + 0.75) * A + e * F + 16 + low


def outside(p: Plan) -> float:
    """Bytes a token kept outside the blocks: ids, the inputs of ln0 and ln_out, the gradient that head_loss forms."""
    D, e = p.sizes.n_embd, p.e
    ln0 = not p.lora or "ln" in p.parts
    first = (4 if not p.lora else p.frozen) * D + 8
    return 16 + (first if ln0 else 0) + (e * D + 8) + e * D


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
        whole = sum(rows * columns for _, rows, columns in matrices(s))
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
    N = p.tokens
    block = kept(p)
    activations = ((e * s.n_embd * s.n_layer if p.grad_cp else block * s.n_layer) + outside(p)) * N
    recomputed = block * N if p.grad_cp else 0.0
    logits = _logits(p)
    head = 0.0 if p.lora or zero else 4.0 * s.vocab_size * s.n_embd  # its gradient is formed in the forward pass
    passing = _passing(p)
    fixed = {"weights": weights, "optimizer": optimizer}
    buckets = _buckets(p, numbers, learns)
    held = gradients if p.accumulate > 1 or zero else 0.0
    phases = {
        "forward": {**fixed, "gradients": max(held, head), "activations": activations, "logits": logits, "workspace": buckets},
        "backward": {**fixed, "gradients": max(held, head), "activations": activations + recomputed, "workspace": passing + buckets},
        "end of backward": {
            **fixed,
            "gradients": gradients,
            "activations": outside(p) * N + block * N,
            "workspace": passing + buckets,
        },
        "optimizer": {**fixed, "gradients": gradients, "workspace": _stepping(p, learns) + buckets},
    }
    around = {"process": CONTEXT if p.gpu else PROCESS}
    peaks = {name: round(sum((parts | around).values())) for name, parts in phases.items()}
    peaks["backward"] = max(peaks["backward"], peaks.pop("end of backward"))
    fullest = max(phases.values(), key=lambda parts: sum(parts.values()))
    device = {"weights": 0, "gradients": 0, "optimizer": 0, "activations": 0, "logits": 0, "workspace": 0} | fullest | around
    if p.gpu:
        loading = 4 * (numbers + adapters) * _per_node(p)  # a process reads the model before it goes to its GPU
        host = {"process": PROCESS * _per_node(p), "loading": max(0.0, loading - sum(host.values()))} | host
    else:
        host = {name: host.get(name, 0) + value * _per_node(p) for name, value in device.items()}
    return Estimate(_round(device), _round(host), peaks)


def _round(parts: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in parts.items()}


def _optimizer(p: Plan, learns: int) -> float:
    if p.optimizer == "adam":
        return 8.0 * learns
    shapes = [(p.r, columns) for _, columns in adapted(p)] + [(rows, p.r) for rows, _ in adapted(p)]
    shapes = shapes if p.lora else [(rows, columns) for _, rows, columns in matrices(p.sizes)]
    rest = learns - sum(rows * columns for rows, columns in shapes)
    return 4.0 * (sum(rows + columns for rows, columns in shapes) + rest)


def _logits(p: Plan) -> float:
    s, e = p.sizes, p.e
    rows = min(max(1, CHUNK_BYTES // (4 * s.vocab_size)), p.tokens)
    chunk = rows * s.vocab_size
    head = 0 if (p.frozen if p.lora else 4) == e or p.stage else e * s.vocab_size * s.n_embd  # the head in the products' dtype
    part = min(s.vocab_size, SLICE)
    if p.gpu:
        room = 12 * chunk  # torch's operations: a copy in fp32, and two that come and go
    else:
        room = 8 * part * rows if e == 4 else 0  # oneDNN's result, in its own form and in torch's
        room += 0 if p.lora else (4 if e == 4 else 6) * part * s.n_embd  # the head's gradient, a slice at a time
    return e * chunk + head + room


def _passing(p: Plan) -> float:
    """What comes and goes in the backward pass of a block: gradients of its tensors, inputs formed again, and a weight's."""
    D, F = p.sizes.n_embd, p.sizes.dim_ffn
    tensors = p.e * (3 * D + (1 if p.lora else 2) * F)
    if p.gpu and p.e == 2:
        tensors += 8 * F  # fp32 inside the plain formulas
    weight = 0 if p.lora else (p.e + 4) * D * F
    return tensors * p.tokens + weight


def _stepping(p: Plan, learns: int) -> float:
    """What an optimizer step takes for a while: Adam two tensors like the largest, Adafactor three."""
    if p.stage or p.gpu:  # fused
        largest = 0
    elif p.lora:
        largest = max((p.r * max(shape) for shape in adapted(p)), default=0)
    else:
        largest = max(rows * columns for _, rows, columns in matrices(p.sizes))
    return (2 if p.optimizer == "adam" else 3) * 4.0 * largest


def _buckets(p: Plan, numbers: int, learns: int) -> float:
    if not p.stage:
        ddp = p.devices > 1 or p.strategy.startswith("ddp")
        return 4.0 * learns if ddp else 0.0
    bucket = p.ds_bucket_mb * 10**6 * p.e
    sent = 2 * bucket if p.stage >= 2 else bucket  # two, while one is sent
    gathered = min(numbers, LIVE) * p.e if p.stage == 3 else 0
    return min(sent, 2 * p.e * max(learns, 1)) + gathered


def largest(p: Plan, limit: int, what: str) -> int:
    """The largest micro_bsz or ctx_len (a multiple of 1 or 16) whose device total is within `limit` bytes; 0 if none is."""
    unit = 16 if what == "ctx_len" else 1

    def fits(count: int) -> bool:
        change: dict[str, Any] = {what: count * unit}
        return estimate(replace(p, **change)).total <= limit

    if not fits(1):
        return 0
    high = 2
    while fits(high) and high < 1 << 30:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def changes(p: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes that take less memory, the cheapest first, each as flags and the plan that they make."""
    micros = [m for m in range(p.micro_bsz - 1, 0, -1) if p.micro_bsz % m == 0]

    def flags(q: Plan) -> str:
        words = []
        if q.micro_bsz != p.micro_bsz:
            words.append(f"--micro_bsz {q.micro_bsz} --accumulate_grad_batches {q.accumulate} (the same step)")
        words += ["--grad_cp 1"] if q.grad_cp and not p.grad_cp else []
        words += [f"--precision {q.precision}"] if q.precision != p.precision else []
        words += [f"--strategy {q.strategy}"] if q.strategy != p.strategy else []
        words += [f"--optimizer {q.optimizer}"] if q.optimizer != p.optimizer else []
        words += ["LoRA (scripts/lora.py)"] if q.lora and not p.lora else []
        words += [f"--ctx_len {q.ctx_len}"] if q.ctx_len != p.ctx_len else []
        return ", ".join(words)

    def smaller(q: Plan) -> Iterator[Plan]:
        for m in micros:
            yield replace(q, micro_bsz=m, accumulate=p.accumulate * p.micro_bsz // m)

    tried = [*smaller(p)]
    recompute = replace(p, grad_cp=True)
    tried += [recompute, *smaller(recompute)]
    least = replace(recompute, micro_bsz=1, accumulate=p.accumulate * p.micro_bsz)
    half = replace(least, precision="bf16")
    tried += [half] if p.e == 4 else []
    if p.gpu and not p.stage:
        tried += [replace(half, strategy=name) for name in offered(p.devices)]
    if not p.lora:
        tried += [replace(half, optimizer="adafactor"), replace(half, lora=True)]
    context = p.ctx_len // 2
    while context >= 64:
        tried.append(replace(half, ctx_len=context))
        if not p.lora:
            tried.append(replace(half, lora=True, ctx_len=context))
        context //= 2
    for q in tried:
        if q != p:
            yield flags(q), q


def offered(devices: int) -> list[str]:
    """DeepSpeed strategies that take less memory, those that cost least time first."""
    alone = ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]
    return alone if devices == 1 else ["deepspeed_stage_2", "deepspeed_stage_3", *alone]


def remedy(p: Plan, limit: int) -> tuple[str, Plan] | None:
    """The cheapest change by which the run fits into `limit` bytes a device; None if none is known."""
    return next(((words, q) for words, q in changes(p) if estimate(q).total <= limit), None)


def in_words(p: Plan, found: Estimate, card: float = 0) -> str:
    """Tables of the parts, in GB, and what fits on a card of `card` GB."""
    lines = [f"{'GB':<13}{'device':>9}{'host':>9}"]
    for name in dict.fromkeys([*found.device, *found.host]):
        lines.append(f"{name:<13}{found.device.get(name, 0) / GB:>9.2f}{found.host.get(name, 0) / GB:>9.2f}")
    lines.append(f"{'total':<13}{found.total / GB:>9.2f}{found.host_total / GB:>9.2f}")
    lines.append("peaks:       " + ", ".join(f"{name} {value / GB:.2f}" for name, value in found.phases.items()))
    if guide := guide_of(p.sizes):
        lines.append(f"the guide:   {guide} GB, for full tuning")
    if card:
        lines += [f"{name + ':':<13}{value}" for name, value in on_card(p, card).items()]
    return "\n".join(lines)


def guide_of(s: Sizes) -> int | None:
    """The guide's GB for a published size, or None."""
    return next((gb for name, gb in GUIDE.items() if MODELS[name] == (s.n_layer, s.n_embd)), None)


def on_card(p: Plan, card: float) -> dict[str, Any]:
    """Whether the plan fits on a card of `card` GB, the largest batch and context on it, and the cheapest change where it does not."""
    limit = round(card * GB)
    fits = estimate(p).total <= limit
    answer: dict[str, Any] = {
        "fits": f"{'yes' if fits else 'no'}, on {card:g} GB",
        "micro_bsz": f"at most {largest(p, limit, 'micro_bsz')} at ctx_len {p.ctx_len}",
        "ctx_len": f"at most {largest(p, limit, 'ctx_len')} at micro_bsz {p.micro_bsz}",
    }
    if not fits:
        found = remedy(p, limit)
        answer["to fit"] = (
            f"{found[0]}: {estimate(found[1]).total / GB:.2f} GB" if found else "no change that is known here does; take a smaller model"
        )
    return answer


def as_dict(p: Plan, found: Estimate, card: float = 0) -> dict[str, Any]:
    """The same for programs, in bytes."""
    answer = {"plan": asdict(p), "device": found.device, "host": found.host, "phases": found.phases, "device_total": found.total}
    answer |= {"host_total": found.host_total, "guide_gb": guide_of(p.sizes)}
    return answer | ({"card_gb": card, **on_card(p, card)} if card else {})


def table() -> str:
    """README's table: GB a GPU at ctx_len 1024, micro_bsz 1, bf16 with --grad_cp 1, one GPU; and beside it the guide's."""
    rows = ["| model | LoRA | full | full, Adafactor | full, ZeRO-2 offload (host) | guide |", "|---|---|---|---|---|---|"]
    for name in MODELS:
        plan = Plan(sizes_of(name), grad_cp=True)
        full = replace(plan, lora=False)
        factored, spread = estimate(replace(full, optimizer="adafactor")), estimate(replace(full, strategy="deepspeed_stage_2_offload"))
        cells = [f"{estimate(q).total / GB:.1f}" for q in (plan, full)] + [f"{factored.total / GB:.1f}"]
        cells.append(f"{spread.total / GB:.1f} ({math.ceil(spread.host_total / GB)})")
        rows.append(f"| {name} | {' | '.join(cells)} | {GUIDE.get(name, '')} |")
    return "\n".join(rows)
