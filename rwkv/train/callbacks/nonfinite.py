"""What becomes of a run whose loss or gradient is no number."""

import math

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.train.console import say
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.resume import state_files
from rwkv.train.resume.home import Home
from rwkv.train.runtime import strategy

IN_A_ROW = 20  # steps that --on_nan skip leaves out before it gives up: the weights themselves are lost by then


class NonFiniteGuard:
    """Watches over the steps of a run, on every rank alike."""

    def __init__(self, config: TrainConfig, home: Home):
        self.config, self._home, self._skipped = config, home, 0

    def check(self, module: TrainingModule, step: int, samples: int, loss: float, norm: float | None) -> None:
        """Look at a step that was made, `samples` over all ranks with it; norm: that of its gradient, None if it does not matter. What --on_nan skip
        has left out is passed over.

        Raises:
            UserError: one of them is no number; by step, batch and last good state. Nothing of the step has been saved.
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
        if self.config.on_nan == "skip" and self._skipped <= IN_A_ROW:
            say(f"warning: {where}; the step is left out")
            return
        saved = state_files.states(self._home.now())
        good = (
            f"the last good state is {saved[0]}; go on from it with other flags by --allow_changes"
            if saved
            else "nothing was saved before it"
        )
        more = f"{self._skipped} steps in a row. " if self._skipped > 1 else ""
        skip = (
            ""
            if self.config.on_nan == "skip" or strategy.zero(self.config)
            else ", or leave such steps out with --on_nan skip"
        )
        raise UserError(f"{where}. {more}Lower --lr_init, or raise the precision{skip}; {good}")

    def _where(self, module: TrainingModule, step: int, end: int, what: str, value: float) -> str:
        count = schedule.samples_per_step(self.config)
        samples = range(end - count, end)
        places = ", ".join(f"{begin} to {end}" for begin, end in map(module.data.window, samples[:4])) + (
            ", …" if count > 4 else ""
        )
        return f"step {step}: the {what} is {value}, in the batch of samples {samples[0]} to {samples[-1]} (tokens {places} of the data)"
