"""The lowest validation loss of a run: when to keep its checkpoint (--keep_best), and when to stop
(--patience).
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from rwkv import checkpoint
from rwkv.config import TrainConfig
from rwkv.errors import UserError

NAME = "rwkv-best.pth"
_FLAGS = (
    *("ctx_len", "val_split", "val_samples", "chatml_mask", "doc_reset", "doc_sep", "doc_training"),
    *("doc_training_seq", "min_ctx_len"),
)


class Best:
    """Follows the validation losses of a run, identically on all ranks.

    Training states contain its `entry`, so a resumed run stops at the same step. Which checkpoint
    is kept is decided by the file's own manifest, which is right even if the run was killed after
    its last state, or the file was deleted.

    Attributes:
        loss, step: the lowest validation loss so far and its step; inf and 0 before the first.
        since: number of validations after it.
    """

    def __init__(self, config: TrainConfig, manifest: dict[str, Any]):
        self._patience, self._keep = config.patience, config.keep_best
        self._run, self._set = manifest.get("id"), validation_set(config, manifest)
        self.loss, self.step, self.since = math.inf, 0, 0
        entry = manifest.get("best")
        if isinstance(entry, dict) and entry.get("set") == self._set:
            self.loss, self.step, self.since = float(entry["loss"]), int(entry["step"]), int(entry["since"])
        self._kept = math.inf

    @property
    def exhausted(self) -> bool:
        """Whether --patience ends the run."""
        return 0 < self._patience <= self.since

    def find_kept(self, folder: Path) -> None:
        """Read the loss of the run's rwkv-best.pth, if there is one."""
        try:
            found = checkpoint.read_manifest(folder / NAME) if (folder / NAME).is_file() else {}
        except UserError:
            found = {}
        same = found.get("run") == self._run and found.get("validation_set") == self._set
        loss = found.get("val_loss")
        self._kept = loss if same and isinstance(loss, float) else math.inf

    def values(self) -> tuple[float, int, int, float]:
        """What other ranks need, see `set_values`."""
        return self.loss, self.step, self.since, self._kept

    def set_values(self, values: tuple[float, int, int, float]) -> None:
        """Set the `values` of rank 0."""
        self.loss, self.step, self.since, self._kept = values

    def add(self, step: int, loss: float) -> bool:
        """Add a validation; returns whether its checkpoint is to be kept."""
        if loss < self.loss:
            self.loss, self.step, self.since = loss, step, 0
        else:
            self.since += 1
        if not (self._keep and loss < self._kept):
            return False
        self._kept = loss
        return True

    def entry(self) -> dict[str, Any] | None:
        """The entry of the run's manifest; None before the first validation."""
        if not math.isfinite(self.loss):
            return None
        return {"loss": self.loss, "step": self.step, "since": self.since, "set": self._set}

    def entries(self, loss: float) -> dict[str, Any]:
        """Additional entries of the manifest of rwkv-best.pth."""
        return {"val_loss": loss, "run": self._run, "validation_set": self._set}

    def describe(self) -> str:
        """Why the run was stopped."""
        return (
            f"the validation loss has not been lower than {self.loss:.3f} (step {self.step:,}) in {self.since:,} validation"
            f"{'s' * (self.since != 1)} (--patience {self._patience})"
        )


def validation_set(config: TrainConfig, manifest: dict[str, Any]) -> str:
    """Identifies what the validation loss is computed on: losses on other sets cannot be
    compared.
    """
    data = manifest.get("validation") or manifest.get("data") or {}
    content = {key: value for key, value in data.items() if key != "prefix"}
    flags = {name: getattr(config, name) for name in _FLAGS}
    return hashlib.sha256(json.dumps([content, flags], sort_keys=True).encode()).hexdigest()[:16]
