"""Pass rank 0's resolved flags to all ranks, and compare flags and inputs once they are connected.

Values chosen automatically (random seed, `--precision auto`, `--auto`, the run to resume) may
differ between machines; the ranks would train different models, or hang in a collective operation.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.train.run import Run
from rwkv.train.runtime import strategy
from rwkv.train.runtime.lightning import rank_zero_only
from rwkv.train.runtime.process import environment

_RESOLVED = "RWKV_RESOLVED_FLAGS"  # environment variable for the ranks that rank 0 starts
_WAIT = timedelta(minutes=30)  # timeout for an answer of rank 0
_RUNS = itertools.count()  # number of runs in this process

# flags that may differ between ranks: paths (files are compared by content), those used on rank 0
# only, and those already resolved. If the launcher has no store (srun; torchrun --standalone of
# torch 1.13.1), every rank draws a random seed; initial weights and data order are rank 0's.
_OWN = {
    "accelerator",
    "allow_changes",
    "auto",
    "data_file",
    "ds_config",
    "load_model",
    "lora_load",
    "overwrite",
    "proj_dir",
    "random_seed",
    "state_load",
    "tensorboard",
    "val_file",
    "wandb",
}


class Ranks:
    """Passes rank 0's flags to the other ranks before the process group is initialised.

    Ranks that rank 0 starts get them in an environment variable, ranks started by torchrun
    through its store. With other launchers every rank resolves its own flags, and `compare` reports
    differences.
    """

    def __init__(self) -> None:
        self._first = rank_zero_only.rank == 0
        self._changes: dict[str, Any] = {}
        self._store = _store()

    def receive(self) -> dict[str, Any] | None:
        """The flags that rank 0 changed, with their values; None if this rank has to resolve its
        own.

        Raises:
            UserError: rank 0 does not answer.
        """
        if self._first or not (self._store or os.environ.get(_RESOLVED)):
            return None
        if changes := os.environ.get(_RESOLVED):
            return json.loads(changes)
        try:
            return json.loads(self._store.get("flags"))
        except RuntimeError as error:  # base class of torch 2's DistError
            raise UserError(
                f"rank {rank_zero_only.rank}: no flags received from rank 0 ({str(error).splitlines()[0]}); see the messages of rank 0 for the reason"
            ) from error

    def send(self, flags: TrainConfig, resolved: TrainConfig) -> None:
        """On rank 0: send the changed flags to the other ranks."""
        if not self._first:
            return
        before = dataclasses.asdict(flags)
        self._changes = {key: value for key, value in dataclasses.asdict(resolved).items() if value != before[key]}
        if self._store:
            self._store.set("flags", json.dumps(self._changes))

    def passing_flags(self) -> AbstractContextManager[None]:
        """Pass the flags to ranks started in this block."""
        return environment(_RESOLVED, json.dumps(self._changes))


def _store() -> Any:
    """torchrun's key-value store, available before the process group is initialised; None without
    torchrun.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=_WAIT,
        wait_for_workers=False,
    )
    return dist.PrefixStore(f"rwkv/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_RUNS)}/", store)


def facts(run: Run, manifest: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """JSON values by name that must be the same on all ranks."""
    weights = [[name, list(strategy.shape(p)), str(p.dtype), p.requires_grad] for name, p in model.named_parameters()]
    found = {f"--{name}": value for name, value in dataclasses.asdict(run.flags).items() if name not in _OWN}
    found |= {"model": manifest["model"], "precision": manifest["precision"]}
    files = ["data", "validation"]
    files += ["base"] if run.flags.load_model else []  # a new base is written by rank 0 only
    files += ["adapter"] if run.adapter and run.adapter.lora_load else []
    for key in files:
        found[key] = {name: x for name, x in (manifest.get(key) or {}).items() if name not in ("prefix", "path")}
    found["torch"] = manifest["stack"].get("torch")
    found["weights' shapes and types"] = hashlib.sha256(json.dumps(weights).encode()).hexdigest()
    return json.loads(json.dumps(found))


def compare(mine: dict[str, Any]) -> None:
    """Compare the `facts` of all ranks; a collective operation.

    Raises:
        UserError: on every rank, if one differs from rank 0; the process group is destroyed.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    all_facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_facts, mine)
    for rank, theirs in enumerate(all_facts):
        if wrong := [
            f"{key}: {theirs.get(key)}, rank 0: {value}"
            for key, value in all_facts[0].items()
            if theirs.get(key) != value
        ]:
            strategy.leave_process_group()
            raise UserError(
                f"rank {rank} differs from rank 0. "
                + "; ".join(wrong)
                + ". Start every rank with the same command, versions and files; replace auto by an explicit value (such as --precision fp32)"
            )
