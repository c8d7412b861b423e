"""Resolve a run from its flags, the contents of its folder and the header of its checkpoint.

Flags are changed only here. Nothing is created or written.
"""

import dataclasses
import secrets
from typing import Any

from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.memory import auto, estimate, machine
from rwkv.memory.plan import plan_of
from rwkv.models import Sizes
from rwkv.models.version import version_of
from rwkv.train import resume_or_start, setup, stages
from rwkv.train.checks import check, check_bf16_copies
from rwkv.train.console import say
from rwkv.train.data_source import with_vocabulary
from rwkv.train.loop import cuda_graph
from rwkv.train.run import Run
from rwkv.train.runtime.ranks import Ranks
from rwkv.train.runtime.trainer import check_fp8, precision_of, slow_on_gpu

HOPELESS = 10  # times the memory; predictions are off by less than 1.2, and swap is rarely larger


def resolve(flags: TrainConfig, ranks: Ranks) -> Run:
    """Resolve the flags to a run. Flags that rank 0 has changed are used on all ranks.

    Raises:
        UserError: flags are invalid, or incompatible with each other, the machine, the checkpoint
            or the run in the folder; --auto finds nothing that fits into memory.
    """
    received = ranks.receive()
    c = stages.apply(flags) if received is None else dataclasses.replace(flags, **received)
    check(c)
    check_fp8(c)
    c = with_vocabulary(c)
    before = resume_or_start.run_to_resume(c)
    c = _seed_and_precision(c, before)
    new_base, outdated = resume_or_start.new_base(c, before), resume_or_start.outdated(c, before)
    sizes, on_gpu = setup.sizes_of(c, new_base), machine.use_gpu(c.accelerator)
    c = dataclasses.replace(_optimizer_of(c, before), version=version_of(sizes).NAME)
    if c.auto and received is None and c.my_pile_stage != 1:
        c = _auto(c, sizes, on_gpu, before)
    if c.optimizer == "auto":
        c = dataclasses.replace(c, optimizer="adam")
    if c.my_pile_stage != 1:
        check_bf16_copies(c)  # with the precision that auto has become
    if received is None:
        c = _with_cuda_graph(c, sizes, on_gpu)
    _check_memory(c, sizes, on_gpu)
    ranks.send(flags, c)
    return Run(c, sizes, on_gpu, before, new_base, outdated)


def _seed_and_precision(c: TrainConfig, before: dict[str, Any] | None) -> TrainConfig:
    """Set random_seed and precision if they are automatic: to those of the resumed run, if any."""
    seed, precision = c.random_seed, c.precision
    if seed < 0:
        seed = before["flags"]["random_seed"] if before else secrets.randbits(31)
    if precision == "auto":
        precision = before["precision"] if before else precision_of(c)
        if not before and (note := slow_on_gpu(c, precision)):
            say(note)
    shift = max(0, c.my_pile_shift)  # upstream writes 0 as -1
    return dataclasses.replace(c, random_seed=seed, precision=precision, my_pile_shift=shift)


def _optimizer_of(c: TrainConfig, before: dict[str, Any] | None) -> TrainConfig:
    """Set optimizer and release_grads to those of the resumed run, if any and if optimizer is
    automatic. Raises UserError if other flags are incompatible with them.
    """
    if c.optimizer != "auto" or not before:
        return c
    optimizer, released = (
        before["flags"].get(name, value) for name, value in (("optimizer", "adam"), ("release_grads", 0))
    )
    c = dataclasses.replace(c, optimizer=optimizer, release_grads=released)
    check(c)
    return c


def _auto(c: TrainConfig, sizes: Sizes, on_gpu: bool, before: dict[str, Any] | None) -> TrainConfig:
    """Set the flags that --auto chooses. The base of LoRA is quantised only in a new run from
    load_model whose --lora_base is auto; a resumed run keeps what was chosen.
    """
    quantise = isinstance(c, LoRAConfig) and c.lora and c.lora_base == "auto" and bool(c.load_model) and not before
    if isinstance(c, LoRAConfig) and c.lora_base == "auto" and before and before["flags"].get("auto"):
        c = dataclasses.replace(c, lora_base=before["flags"].get("lora_base", "auto"))
    c, chosen = auto.choose(c, plan_of(c, sizes, on_gpu, c.precision), _usable, quantise)
    say(f"auto:  {chosen}")
    return c


def _with_cuda_graph(c: TrainConfig, sizes: Sizes, on_gpu: bool) -> TrainConfig:
    """Set cuda_graph if it is automatic: on if possible, and if its memory fits."""
    resolved = dataclasses.replace(c, cuda_graph=cuda_graph.resolve(c, on_gpu))
    if c.cuda_graph == "auto" and resolved.cuda_graph == "on":
        planned = plan_of(resolved, sizes, on_gpu, c.precision)
        if 0 < auto.available(planned) < estimate.estimate(planned).total:
            return dataclasses.replace(c, cuda_graph="off")
    return resolved


def _check_memory(c: TrainConfig, sizes: Sizes, on_gpu: bool) -> None:
    """Raise UserError if the prediction is HOPELESS times the memory of the device, before anything
    is allocated: filling the memory would take minutes, and end this or another process. Less is
    reported only, when the model is built.
    """
    if c.my_pile_stage == 1:  # only writes weights
        on_gpu, c = False, dataclasses.replace(c, micro_bsz=1, ctx_len=1)
    plan = plan_of(c, sizes, on_gpu, c.precision)
    memory, needed = machine.memory_of(plan.gpu, plan.per_node), estimate.estimate(plan).total
    if memory and needed > HOPELESS * memory:
        raise UserError(
            f"this run needs about {needed / 1e9:,.0f} GB of memory per device, and the device has {memory / 1e9:,.1f} GB"
            f" (--ctx_len {c.ctx_len}, --micro_bsz {c.micro_bsz}; L{sizes.n_layer} D{sizes.n_embd} V{sizes.vocab_size})."
            f" {auto.advice(plan, auto.available(plan))}"
        )


def _usable(c: TrainConfig) -> bool:
    """Whether strategy and optimizer are compatible with the other flags and available on this
    machine.
    """
    try:
        check(c)
    except UserError:
        return False
    return True
