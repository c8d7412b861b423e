"""SIGINT and SIGTERM end a run after the step that it is in, so that it can be saved; a second one ends it at once."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from rwkv.train.lightning import pl
from rwkv.train.module import TrainingModule
from rwkv.train.words import say


class Signals(pl.Callback):
    """Takes the two signals while steps are made. Attribute `received`: the number of the one that came, else 0."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        if threading.current_thread() is not threading.main_thread():  # only there can Python take signals
            return

        def take(number: int, frame: FrameType | None) -> None:
            self._give_back()
            self.received = number
            module.stop = True
            name = signal.Signals(number).name
            say(f"\n{name}: the run is saved after this step, then it ends; once more ends it at once, unsaved")

        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, take)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._give_back()

    def _give_back(self) -> None:
        # Not to Lightning's handlers, which wait for a better moment: the second signal is in earnest.
        defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        for number in self._before:
            signal.signal(number, defaults[number])
        self._before = {}

    def exit(self) -> None:
        """End the process as a signal ends one: status 130 after SIGINT, 143 after SIGTERM (also where another rank received it)."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signal.SIGTERM)
