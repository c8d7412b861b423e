"""The report at the start of a run: model, data, length, coverage, precision."""

import math

from rwkv.config import TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.data.dataset import Contexts, Documents, Samples, ValidationSamples
from rwkv.data.pairs import Pairs
from rwkv.kernels import quant
from rwkv.models import RWKV
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.runtime import strategy


def start(
    c: TrainConfig, model: RWKV, data: Dataset, training: Samples, validation_samples: ValidationSamples | None
) -> None:
    """Report what is trained, on which data, for how long."""
    s = model.sizes
    total = sum(p.numel() for p in model.parameters()) + sum(m.numel() for m in quant.quantised_in(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = "all trained" if trained == total else f"{trained / 1e6:.2f} million trained"
    samples = schedule.total_steps(c) * schedule.samples_per_step(c)
    masked = ", some of them masked out of the loss" if training.stream.masked else ""
    validation = (
        f"validation: {f'{c.val_file}, ' if c.val_file else ''}{len(validation_samples.source.stream):,} tokens, not used in training; the validation loss is computed on {validation_samples.total:,} samples\n"
        if validation_samples
        else ""
    )
    say(
        f"model: RWKV-{model.version.NAME}, L{s.n_layer} D{s.n_embd} V{s.vocab_size}, {total / 1e6:.2f} million parameters, {what}\n"
        f"data: {data.prefix}, {len(data):,} documents, {len(data.tokens):,} tokens{masked}\n"
        + validation
        + f"length: {_length(c, len(data.tokens))}\n"
        + f"learning rate: {schedule.describe(c)}\n"
        + f"coverage: {_coverage(training, samples)}; seed {training.seed}\n"
        + f"precision: {_precision(c, model)}"
    )


def _length(c: TrainConfig, tokens: int) -> str:
    """The length of the run, the flag that determines it, and the length of an epoch."""
    per_epoch, first = schedule.steps_per_epoch(c), schedule.first_step(c)
    last, flag, per_step = first + schedule.total_steps(c), schedule.ended_by(c), schedule.tokens_per_step(c)
    begin, end = first // per_epoch, -(-last // per_epoch) - 1
    if last % per_epoch:
        which = f"part of epoch {end}" if begin == end else f"epochs {begin} to {end - 1} and part of epoch {end}"
    else:
        which = f"epoch {end}" if begin == end else f"epochs {begin} to {end}"
    return (
        f"{_count(last - first, 'step')} of {per_step:,} tokens (--{flag} {getattr(c, flag)}), {which}. One epoch here = {_count(per_epoch, 'step')} ="
        f" {per_epoch * per_step:,} tokens (set by --epoch_steps, not by your data; your data is {tokens:,} tokens)"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def _precision(c: TrainConfig, model: RWKV) -> str:
    """The precision, and the dtype of frozen weights; see `types` for details."""
    frozen = _stored(model, trained=False)
    return (
        f"{c.precision}"
        + (f", frozen weights stored in {'/'.join(frozen)}" if frozen else "")
        + " (all data types: run.json)"
    )


def _stored(model: RWKV, trained: bool) -> list[str]:
    """The data types in which trained or frozen weights are stored."""
    found = {str(p.dtype)[6:] for p in model.parameters() if p.requires_grad == trained}
    return sorted(found | (set() if trained else {m.kind for m in quant.quantised_in(model)}))


def types(c: TrainConfig, model: RWKV) -> str:
    """Describe the data types of weights, gradients and computations, for run.json."""
    stored = {trained: _stored(model, trained) for trained in (True, False)}
    precision = c.precision
    matmuls = {"tf32": "tf32 (float32 with a 10-bit mantissa)", "bf16": "bfloat16", "fp16": "float16"}.get(
        precision, "float32"
    )
    inputs = {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32")
    trained = "/".join(stored[True])
    copies = ", bfloat16 copies of matrices" if c.bf16_copies else ""
    weights = f"trained weights {trained} (they are the master weights){copies}, gradients {trained}, Adam's moments {trained}"
    if c.optimizer == "adamw8bit" and c.adapter:
        weights = (
            f"trained weights {trained} (they are the master weights), gradients {trained}, AdamW's moments 8-bit, of small tensors"
            " float32"
        )
    elif c.optimizer == "adamw8bit":
        weights = "trained matrices and their gradients bfloat16 (no masters; stochastic rounding), other trained weights float32, AdamW's moments 8-bit, of small tensors float32"
    if c.optimizer == "muon":
        products = "bfloat16" if precision == "bf16" else "float32"
        weights = (
            f"trained weights {trained} (they are the master weights), gradients, Muon's momentum and AdamW's moments {trained}, matmuls of Muon"
            f" {products}"
        )
    if strategy.zero(c) and inputs != "float32":
        stored[False] = stored[False] and [inputs]
        weights = f"trained weights and gradients {inputs}, their master weights and Adam's moments float32 (as DeepSpeed stores them)"
    return (
        f"{precision}: {weights}"
        + (f", frozen weights {'/'.join(stored[False])}" if stored[False] else "")
        + (", matmuls with them in fp8, rounded to bfloat16" if "fp8" in stored[False] else "")
        + f", matmuls {matmuls}, WKV inputs {inputs}, WKV computation float32, loss float32"
        + (", scaled" if precision == "fp16" else "")
    )


def _coverage(training: Samples, samples: int) -> str:
    """How often this many samples cover the data, in which order, and which part is never used."""
    if isinstance(training, Documents):
        packed, passes = training.packed, samples / training.per_pass
        omitted = packed.too_long + packed.too_short
        order = "in order" if training.sequential else "shuffled"
        return (
            f"{_passes(passes)} the documents, {order}; one pass = {_count(training.per_pass, 'sample')} of whole documents"
            + (f"; {_count(omitted, 'document')} omitted: too long or too short" if omitted else "")
            + (f"; {1 - passes:.0%} of the samples are never used" if passes < 0.995 else "")
        )
    if isinstance(training, Pairs):
        passes, order = samples / training.per_pass, "in order" if training.sequential else "shuffled"
        return (
            f"{_passes(passes)} {_count(training.per_pass, 'pair')}, {order}"
            + (f"; {_count(training.too_long, 'pair')} omitted: too long" if training.too_long else "")
            + (f"; {1 - passes:.0%} of the pairs are never used" if passes < 0.995 else "")
        )
    times = samples * training.ctx_len / len(training.stream)
    if isinstance(training, Contexts) and training.prime:
        return (
            f"{_passes(times)} the data, by prime sampling (p = {training.prime}): no position is used twice within"
            f" {_count(training.prime, 'sample')}"
        )
    missed = math.exp(-times)  # for independent positions that cover each token `times` times on average
    rest = (
        f": about {missed:.0%} of it is never used. Use --magic_prime -1 or --doc_training 1 to use all of it"
        if missed >= 0.01
        else ""
    )
    return f"{_passes(times)} the data, at random positions{rest}"


def _passes(times: float) -> str:
    if times >= 100:
        return f"{times:,.0f} passes over"
    return (
        f"{times:.2g} passes over"
        if times >= 1.5 or times < 0.995
        else "1 pass over"
        if times < 1.05
        else f"{times:.1f} passes over"
    )
