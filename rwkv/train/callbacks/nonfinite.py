"""Detect NaN and Inf in losses and gradients."""

import math

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.resume import state_files
from rwkv.train.resume.tracked_folder import TrackedFolder
from rwkv.train.runtime import strategy

MAX_SKIPPED = 20  # consecutive steps that --on_nan skip tolerates; more mean that the weights are corrupt


class NonFiniteGuard:
    """Checks every step of a run, identically on all ranks."""

    def __init__(self, config: TrainConfig, tracked: TrackedFolder):
        self.config, self._folder, self._skipped = config, tracked, 0

    def check(self, module: TrainingModule, step: int, samples: int, loss: float, norm: float | None) -> None:
        """Check a completed step. Steps that --on_nan skip has skipped are only reported.

        Args:
            samples: number of samples up to and including this step, over all ranks.
            norm: of the gradient; None: not checked.

        Raises:
            UserError: the loss or the norm is NaN or Inf; names the step, its batch and the last
                valid state. The step has not been saved.
        """
        wrong = [
            (what, x)
            for what, x in (("loss", loss), ("norm of the gradient", norm))
            if x is not None and not math.isfinite(x)
        ]
        if not wrong:
            self._skipped = 0
            return
        self._skipped += 1
        where = self._where(module, step, samples, *wrong[0])
        if self.config.on_nan == "skip" and self._skipped <= MAX_SKIPPED:
            say(f"warning: {where}; step skipped")
            return
        saved = state_files.states(self._folder.path())
        good = (
            f"the last valid state is {saved[0]}; to resume from it with other flags, add --allow_changes"
            if saved
            else "nothing was saved before it"
        )
        more = f"{self._skipped} consecutive steps. " if self._skipped > 1 else ""
        skip = (
            ""
            if self.config.on_nan == "skip" or strategy.zero(self.config)
            else ", or skip such steps with --on_nan skip"
        )
        raise UserError(f"{where}. {more}Lower --lr_init, or raise the precision{skip}; {good}")

    def _where(self, module: TrainingModule, step: int, end: int, what: str, value: float) -> str:
        count = schedule.samples_per_step(self.config)
        samples = range(end - count, end)
        places = ", ".join(f"{begin} to {end}" for begin, end in map(module.data.window, samples[:4])) + (
            ", …" if count > 4 else ""
        )
        return f"step {step}: the {what} is {value}, in the batch of samples {samples[0]} to {samples[-1]} (tokens {places} of the data)"
