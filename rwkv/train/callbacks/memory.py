"""Measure the peak memory of each phase of a step, compare it with the prediction, and explain
out-of-memory errors.
"""

import contextlib
from collections.abc import Iterator

import torch

from rwkv.errors import UserError
from rwkv.memory import auto, estimate, machine
from rwkv.memory.plan import Plan
from rwkv.train.runtime.lightning import pl

PHASES = ("forward", "backward", "optimizer")


class MemoryMonitor(pl.Callback):
    """Measures peak memory in bytes: on a GPU of torch's allocator, else the resident memory of
    this process.

    Args:
        plan: for the prediction.
        resting: resident bytes of this process before the model was created.

    Attributes:
        peaks: of each phase of the last step, over all its micro-batches. If the kernel does not
            support resetting the peak (/proc/self/clear_refs), the peak so far.
        peak: over all steps so far.
    """

    def __init__(self, plan: Plan, resting: int):
        self.plan, self.predicted = plan, estimate.estimate(plan)
        self.peaks, self.peak, self._stepped = dict.fromkeys(PHASES, 0), 0, -1
        self._offset = -estimate.CONTEXT if plan.gpu else resting + estimate.LOADED - plan.process
        self._device = torch.device("cpu")

    def expected(self) -> int:
        """Predicted peak in bytes, comparable with `peak`: corrected by `resting`, or on a GPU
        without the CUDA context.
        """
        return self.predicted.total + self._offset

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        self._device = trainer.strategy.root_device
        if trainer.global_step != self._stepped:
            self._stepped, self.peaks = trainer.global_step, dict.fromkeys(PHASES, 0)
        self._read()

    def on_before_backward(self, *_) -> None:
        self._note("forward")

    def on_after_backward(self, *_) -> None:
        self._note("backward")

    def on_train_batch_end(self, *_) -> None:
        self._note("optimizer")

    def line(self) -> dict[str, int | dict[str, int]]:
        """Entries for metrics.jsonl, in MiB."""
        found: dict[str, int | dict[str, int]] = {"peak_mib": {name: value >> 20 for name, value in self.peaks.items()}}
        if self._device.type == "cuda":
            found |= {"rss_peak_mib": machine.rss_peak() >> 20, "gpu_peak_mib": self.peak >> 20}
            return found | {"gpu_used_mib": machine.gpu_used(self._device.index or 0) >> 20}
        return found | {"rss_peak_mib": self.peak >> 20}

    def summary(self) -> str:
        """Predicted and measured peak, as text."""
        return f"{self.expected() / 1e9:.2f} GB per device predicted, {self.peak / 1e9:.2f} GB measured ({self.peak / self.expected():.0%})"

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Convert out-of-memory errors to UserErrors with the prediction, the measured peak and the
        cheapest change that fits.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            limit = auto.available(self.plan)
            self.peak = max(self.peak, self._read())
            # other processes may use memory: less than `limit` was available if the peak is below
            # the prediction
            usable = (
                min(limit or self.peak, self.peak)
                if self.peak and (self.peak < self.expected() or not limit)
                else limit
            )
            raise UserError(
                f"out of memory. {self.expected() / 1e9:.2f} GB per device were predicted; {self.peak / 1e9:.2f} GB"
                f"{f' of {limit / auto.USABLE / 1e9:.2f} GB' if limit else ''} were in use when an allocation failed. {auto.advice(self.plan, usable - self._offset)}"
            ) from error

    def _note(self, phase: str) -> None:
        self.peaks[phase] = max(self.peaks[phase], self._read())
        self.peak = max(self.peak, self.peaks[phase])

    def _read(self) -> int:
        """The peak since the last call, in bytes."""
        if self._device.type != "cuda":
            return machine.rss_peak(restart=True)
        # memory in the pool of a CUDA graph does not count as allocated
        peak = (torch.cuda.max_memory_reserved if self.plan.graph else torch.cuda.max_memory_allocated)(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that torch, its libraries or Python ran out of memory."""
    text = str(error)
    signs = ("can't allocate memory", "out of memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(sign in text for sign in signs)
