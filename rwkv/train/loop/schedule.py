"""Learning rate and weight decay by step, with upstream's formulas.

Steps are optimizer steps: with accumulation an epoch has epoch_steps / accumulate_grad_batches of
them, so that the schedule ends with the run. (Upstream counts batches, so its schedule ends too
late.)
"""

import math

from rwkv.config import TrainConfig
from rwkv.models.version import named


def steps_per_epoch(c: TrainConfig) -> int:
    """Optimizer steps in an epoch."""
    return max(1, c.epoch_steps // c.accumulate_grad_batches)


def ends_epoch(c: TrainConfig, step: int) -> bool:
    """Whether an epoch or the run ends with this optimizer step (counted from epoch 0)."""
    return step % steps_per_epoch(c) == 0 or step == first_step(c) + total_steps(c)


def first_step(c: TrainConfig) -> int:
    """Optimizer steps in the epochs before epoch_begin."""
    return c.epoch_begin * steps_per_epoch(c)


def first_sample(c: TrainConfig) -> int:
    """Samples in the epochs before epoch_begin, over all devices."""
    return c.epoch_begin * c.epoch_steps * c.world_size * c.micro_bsz


def samples_per_step(c: TrainConfig) -> int:
    """Samples in one optimizer step, over all devices and accumulated batches."""
    return c.world_size * c.micro_bsz * c.accumulate_grad_batches


def tokens_per_step(c: TrainConfig) -> int:
    """Tokens in one optimizer step, over all devices and accumulated batches."""
    return samples_per_step(c) * c.ctx_len


def total_steps(c: TrainConfig) -> int:
    """Optimizer steps of the run, until epoch_count, my_exit, max_steps or my_exit_tokens,
    whichever comes first.
    """
    return max(0, min(_ends(c).values()))


def ended_by(c: TrainConfig) -> str:
    """The name of the flag that ends the run."""
    ends = _ends(c)
    return min(ends, key=ends.__getitem__)


def _ends(c: TrainConfig) -> dict[str, int]:
    ends = {"epoch_count": steps_per_epoch(c) * max(0, c.epoch_count - c.epoch_begin)}
    ends["my_exit"] = steps_per_epoch(c) * max(0, c.my_exit + 1 - c.epoch_begin)
    if c.max_steps:
        ends["max_steps"] = c.max_steps
    if c.my_exit_tokens:
        ends["my_exit_tokens"] = math.ceil(abs(c.my_exit_tokens) / tokens_per_step(c)) - first_step(c)
    return ends


def _progress(c: TrainConfig, step: int) -> float:
    """Progress of the schedule, 0 to 1; `step` counts from epoch 0."""
    per_epoch = steps_per_epoch(c)
    begin = c.my_pile_edecay * per_epoch
    length = (c.epoch_count - c.my_pile_edecay) * per_epoch - c.warmup_steps
    return _clamp((step - begin - c.warmup_steps + 1) / length) if length > 0 else 1.0


def learning_rate(c: TrainConfig, run_step: int) -> float:
    """The learning rate of optimizer step `run_step` (from 0) of this run.

    With q from 0 to 1 over the epochs: lr_init · (lr_final / lr_init)^q, or linear in q if either
    is 0. With my_exit_tokens: a cosine over that many tokens, or if it is negative the mean of
    both. During warm-up it is multiplied by s + (1 − s) · run_step / warmup_steps with the
    version's WARMUP_START s.
    """
    step = run_step + first_step(c)
    rate = c.lr_init
    if c.lr_init != c.lr_final:
        q = _progress(c, step)
        if c.lr_init == 0 or c.lr_final == 0:
            rate = c.lr_init + (c.lr_final - c.lr_init) * q
        else:
            rate = c.lr_init * (c.lr_final / c.lr_init) ** q
        if c.my_exit_tokens:
            cosine = c.lr_init * _cosine(c, step)
            rate = cosine if c.my_exit_tokens > 0 else (cosine + rate) / 2
    if run_step < c.warmup_steps:
        start = named(c.version).WARMUP_START
        rate *= start + (1 - start) * run_step / c.warmup_steps
    return rate


def _cosine(c: TrainConfig, step: int) -> float:
    warmup = c.warmup_steps * tokens_per_step(c)
    q = _clamp((step * tokens_per_step(c) - warmup) / max(1, abs(c.my_exit_tokens) - warmup))
    floor = c.lr_final / c.lr_init if c.lr_init else 0.0
    return (0.5 + floor / 2) + (0.5 - floor / 2) * math.cos(math.pi * q)


def weight_decay(c: TrainConfig, run_step: int) -> float:
    """The weight decay of optimizer step `run_step`: constant, or exponential to
    weight_decay_final.
    """
    if c.weight_decay <= 0 or c.weight_decay_final <= 0:
        return max(0.0, c.weight_decay)
    q = _progress(c, run_step + first_step(c))
    return c.weight_decay * (c.weight_decay_final / c.weight_decay) ** q


def _clamp(x: float) -> float:
    return min(1.0, max(0.0, x))
