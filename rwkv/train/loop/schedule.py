"""Learning rate and weight decay by step, with upstream's formulas.

Steps are optimizer steps: with accumulation an epoch has epoch_steps / accumulate_grad_batches of
them, so that the schedule ends with the run. (Upstream counts batches, so its schedule ends too
late.)
"""

import math

from rwkv.config import TrainConfig
from rwkv.errors import UserError
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
    return samples_per_step(c) * c.sequences * c.ctx_len


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

    With q from 0 to 1 over the epochs, by lr_schedule:

        exp       lr_init · (lr_final / lr_init)^q
        linear    lr_init + (lr_final − lr_init) · q
        cosine    lr_init + (lr_final − lr_init) · (1 − cos πq) / 2
        wsd       as linear, with q from 0 to 1 over the last decay_steps
        constant  lr_init
        auto      exp, linear if either is 0; with my_exit_tokens a cosine over that many tokens, or
                  if it is negative the mean of both

    During warm-up it is multiplied by s + (1 − s) · run_step / warmup_steps with the
    version's WARMUP_START s.
    """
    step = run_step + first_step(c)
    rate = c.lr_init
    if c.lr_schedule not in ("auto", "constant"):
        rate = _scheduled(c, step)
    elif c.lr_init != c.lr_final and c.lr_schedule == "auto":
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


def _scheduled(c: TrainConfig, step: int) -> float:
    q, span = _progress(c, step), c.lr_final - c.lr_init
    if c.lr_schedule == "exp":
        return c.lr_init * (c.lr_final / c.lr_init) ** q
    if c.lr_schedule == "cosine":
        return c.lr_init + span * (1 - math.cos(math.pi * q)) / 2
    if c.lr_schedule == "wsd":
        steps = decay_steps(c)
        q = _clamp((step + 1 - (c.epoch_count * steps_per_epoch(c) - steps)) / steps)
    return c.lr_init + span * q


def decay_steps(c: TrainConfig) -> int:
    """Optimizer steps of the decay of lr_schedule wsd: lr_decay_steps, else lr_decay_fraction of
    those after warm-up.
    """
    return c.lr_decay_steps or max(1, round(c.lr_decay_fraction * _length(c)))


def _length(c: TrainConfig) -> int:
    """Optimizer steps of the schedule, after warm-up and my_pile_edecay."""
    return (c.epoch_count - c.my_pile_edecay) * steps_per_epoch(c) - max(0, c.warmup_steps)


def check(c: TrainConfig) -> None:
    """Raise UserError if lr_schedule is incompatible with other flags."""
    wsd = TrainConfig.lr_decay_steps, TrainConfig.lr_decay_fraction
    if c.lr_schedule != "wsd" and (c.lr_decay_steps, c.lr_decay_fraction) != wsd:
        raise UserError("--lr_decay_steps and --lr_decay_fraction are for --lr_schedule wsd: pass it too, or omit them")
    if c.lr_schedule != "auto" and c.my_exit_tokens:
        raise UserError(
            f"--lr_schedule {c.lr_schedule} with --my_exit_tokens {c.my_exit_tokens}, which has its own cosine: omit one of them"
        )
    if c.lr_schedule == "exp" and not (c.lr_init and c.lr_final):
        raise UserError(
            "--lr_schedule exp: --lr_init and --lr_final must be greater than 0; or use --lr_schedule linear"
        )
    if not 0 < c.lr_decay_fraction <= 1:
        raise UserError(f"--lr_decay_fraction must be greater than 0 and at most 1; it is {c.lr_decay_fraction}")
    if c.lr_decay_steps > max(1, _length(c)):
        raise UserError(
            f"--lr_decay_steps {c.lr_decay_steps} is more than the {max(0, _length(c)):,} steps after warm-up; use fewer, or --lr_schedule linear"
        )


def describe(c: TrainConfig) -> str:
    """The course of the learning rate, for the report at the start."""
    constant = c.lr_schedule == "constant" or c.lr_init == c.lr_final
    rate = f"{c.lr_init:g}" if constant else f"{c.lr_init:g} → {c.lr_final:g}"
    name = {"exp": "exponential", "constant": "constant", "wsd": f"wsd, linear in the last {_steps(decay_steps(c))}"}
    kind = name.get(c.lr_schedule, c.lr_schedule)
    if c.lr_schedule == "auto":
        kind = "linear" if c.lr_init == 0 or c.lr_final == 0 else "exponential"
        if c.my_exit_tokens:
            kind = "cosine" if c.my_exit_tokens > 0 else "mean of cosine and exponential"
    warmup = f", after {_steps(c.warmup_steps)} of warm-up" if c.warmup_steps > 0 else ""
    return f"{rate} ({'constant' if constant else kind}{warmup})"


def _steps(count: int) -> str:
    return f"{count:,} step{'s' * (count != 1)}"


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
