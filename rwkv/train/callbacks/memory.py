"""Memory use of a run: the peak of each phase of a step, compared with the prediction; running out of memory is an error with a remedy."""

import contextlib
from collections.abc import Iterator

import torch

from rwkv.errors import UserError
from rwkv.memory import estimate, machine
from rwkv.memory import plan as planning
from rwkv.train.runtime.lightning import pl

PHASES = ("forward", "backward", "optimizer")


class MemoryMonitor(pl.Callback):
    """Peaks in bytes: of torch's allocator on a GPU (what is in use on the whole GPU beside it), else of this process's resident memory.

    Attributes:
        peaks: of the phases of the last step, accumulated batches together. Where the kernel does not let the peak begin anew
            (/proc/self/clear_refs), each is the peak so far.
        peak: so far, over all steps.
    """

    def __init__(self, plan: estimate.Plan, resting: int):
        """`resting`: resident bytes of this process before it had a model."""
        self.plan, self.predicted = plan, estimate.estimate(plan)
        self.peaks, self.peak, self._stepped = dict.fromkeys(PHASES, 0), 0, -1
        self._offset = -estimate.CONTEXT if plan.gpu else resting + estimate.LOADED - plan.process
        self._device = torch.device("cpu")

    def expected(self) -> int:
        """Bytes predicted, for this process as it began (on a GPU without what torch's allocator does not see)."""
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
        """For metrics.jsonl, MiB."""
        found: dict[str, int | dict[str, int]] = {"peak_mib": {name: value >> 20 for name, value in self.peaks.items()}}
        if self._device.type == "cuda":
            found |= {"rss_peak_mib": machine.rss_peak() >> 20, "gpu_peak_mib": self.peak >> 20}
            return found | {"gpu_used_mib": machine.gpu_used(self._device.index or 0) >> 20}
        return found | {"rss_peak_mib": self.peak >> 20}

    def words(self) -> str:
        """Predicted against measured."""
        return f"{self.expected() / 1e9:.2f} GB a device predicted, {self.peak / 1e9:.2f} GB measured ({self.peak / self.expected():.0%})"

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Out of memory becomes a UserError with prediction, measurement and the cheapest remedy."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            limit = planning.available(self.plan)
            self.peak = max(self.peak, self._read())
            # What it was refused at is less than there is: others use the machine too.
            usable = (
                min(limit or self.peak, self.peak)
                if self.peak and (self.peak < self.expected() or not limit)
                else limit
            )
            raise UserError(
                f"out of memory. {self.expected() / 1e9:.2f} GB were predicted on each device and {self.peak / 1e9:.2f} GB were in use when no more"
                f" could be had{f', of {limit / planning.USABLE / 1e9:.2f} GB' if limit else ''}. {planning.advice(self.plan, usable - self._offset)}"
            ) from error

    def _note(self, phase: str) -> None:
        self.peaks[phase] = max(self.peaks[phase], self._read())
        self.peak = max(self.peak, self.peaks[phase])

    def _read(self) -> int:
        """The peak since the last call."""
        if self._device.type != "cuda":
            return machine.rss_peak(restart=True)
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, its libraries or Python could not get memory."""
    text = str(error)
    signs = ("can't allocate memory", "out of memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or any(sign in text for sign in signs)
