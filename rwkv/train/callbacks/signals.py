"""Handle signals: the first stops the run after the current step and saves it, the second stops it
immediately.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from rwkv.streams import silence
from rwkv.train.console import say
from rwkv.train.loop.module import TrainingModule
from rwkv.train.runtime.lightning import pl

# SIGINT: Ctrl-C. SIGTERM: kill, Slurm, docker stop. SIGHUP: a closed terminal. SIGUSR1: the warning
# of Slurm and LSF before the time limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Seconds in which further signals are duplicates of the first: make, Slurm and systemd signal the
# whole process group, and parents forward signals too.
DUPLICATE_SECONDS = 2.0


class Signals(pl.Callback):
    """Handles signals during training.

    Args:
        unsaved: returns the number of steps that are lost if the run stops without saving.

    Attributes:
        received: number of the first signal received; 0 before it.
    """

    def __init__(self, unsaved: Callable[[], int] = lambda: 0) -> None:
        self.received = 0
        self._unsaved = unsaved
        self._at = 0.0
        self._trainer: Any = None
        self._module: Any = None
        self._handled: list[int] = []
        self._outer: dict[int, Any] = {}
        self._terminals: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self._trainer, self._module = trainer, module
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self.listen()

    def listen(self) -> None:
        """Handle signals from now on. Called again after a stopped training, as another rank may
        have received the signal.
        """
        if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
            return
        self._handled = []
        for number in SIGNALS:
            if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:  # e.g. by nohup
                continue
            signal.signal(number, self._handle)
            self._handled.append(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._at < DUPLICATE_SECONDS:
            return
        if self.received:
            self._restore()
            signal.raise_signal(number)
            return
        # first of all, as the next signal may interrupt any call
        self.received, self._at, self._module.stop = number, now, True
        self._keep()
        if number == signal.SIGHUP:  # the terminal is closed: writing to it would fail
            for descriptor in self._terminals:
                silence(descriptor)
        lost = max(1, self._unsaved())
        consequence = f"WITHOUT saving ({lost:,} step{'s' * (lost > 1)} would be lost)"
        if number == signal.SIGINT:
            say(f"\nCtrl-C: finishing this step, then saving. Press Ctrl-C again to stop now {consequence}")
        else:
            name = signal.Signals(number).name
            say(
                f"\n{name}: finishing this step, then saving. Another signal, {DUPLICATE_SECONDS:.0f} seconds from now or later, stops now {consequence}"
            )

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if not self.received:
            self._restore()

    def _keep(self) -> None:
        """Let Lightning restore this handler, not that from before the training, when the training
        ends: a duplicate of the signal would end the process before its last messages.
        """
        outer = self._trainer._signal_connector._original_handlers
        for number in self._handled:
            if number in outer:
                self._outer[number], outer[number] = outer[number], self._handle

    def release(self) -> None:
        """Restore the handlers from before the training, if a signal was received but did not end
        it.
        """
        for number, handler in self._outer.items():
            if handler is not None:  # None: not set by Python
                signal.signal(number, handler)
        self._outer = {}

    def _restore(self) -> None:
        # default handlers, not Lightning's, which delay the signal
        for number in self._handled:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if self._outer:
            self._trainer._signal_connector._original_handlers.update(self._outer)
        self._handled, self._outer = [], {}

    def exit(self) -> NoReturn:
        """Exit with the status of a process ended by the received signal: 130 for SIGINT, 143 for
        SIGTERM, also if another rank received it.
        """
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS[1:]:  # ignore late duplicates
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C may interrupt the exit
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + (self.received or signal.SIGTERM))
