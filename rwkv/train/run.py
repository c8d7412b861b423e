"""The immutable description of a run, created by `rwkv.train.resolve`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rwkv.config import LoRAConfig, TrainConfig
from rwkv.files import sha256
from rwkv.memory.plan import Plan, plan_of
from rwkv.models import Sizes

NEW_BASE = "rwkv-base.pth"  # in the folder of a LoRA run: the base model, if the run created it
# the flags that --my_pile_stage 2, 3 and 4 set (rwkv.train.stages)
STAGE_FLAGS = ("load_model", "epoch_begin", "warmup_steps", "magic_prime", "epoch_steps", "epoch_count")


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        flags: the resolved flags, without automatic values.
        sizes: of the model.
        on_gpu: whether it trains on GPUs.
        before: the manifest of the run to resume; None for a new run, and on all ranks but rank 0.
        new_base: the base model created by an earlier start of this run; None if there is none.
        outdated: files of an earlier run in the folder, to be deleted when this one starts.
    """

    flags: TrainConfig
    sizes: Sizes
    on_gpu: bool
    before: dict[str, Any] | None = None
    new_base: Path | None = None
    outdated: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder of the run when it started."""
        return self.flags.folder

    @property
    def adapter(self) -> LoRAConfig | None:
        """The flags of the adapter; None if all weights are trained."""
        return self.flags.adapter

    @property
    def base_path(self) -> str:
        """Path of the base model of an adapter."""
        return self.flags.load_model or str(self.folder / NEW_BASE)

    @cached_property
    def base(self) -> dict[str, str] | None:
        """Path and SHA-256 of the checkpoint that training starts from; None for a new model."""
        path = self.flags.load_model or (self.new_base if self.before else None)
        return {"path": str(path), "sha256": sha256(path)} if path else None

    @cached_property
    def plan(self) -> Plan:
        """The memory plan."""
        return plan_of(self.flags, self.sizes, self.on_gpu, self.flags.precision)
