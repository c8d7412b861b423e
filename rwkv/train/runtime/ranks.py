"""All ranks train with the flags that rank 0 resolved, and compare them once they are connected.

What is left to the program (a random seed, `--precision auto`, `--auto`, the run to resume) may come out differently on two machines, which would
then train different models, or hang in a collective operation.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.train.run import Run
from rwkv.train.runtime import strategy
from rwkv.train.runtime.lightning import rank_zero_only

_RESOLVED = "RWKV_RESOLVED_FLAGS"  # environment variable for the ranks that Lightning starts
_WAIT = timedelta(minutes=30)  # for an answer of rank 0
_RUNS = itertools.count()  # of this process

# Flags that may differ between ranks: paths (files are compared by content), what only rank 0 does, and what has been resolved.
_OWN = {
    *("proj_dir", "data_file", "val_file", "load_model", "lora_load", "ds_config", "wandb", "tensorboard", "overwrite"),
    *("allow_changes", "accelerator", "auto", "random_seed"),
}


class Ranks:
    """Hands rank 0's flags to the other ranks before they are connected.

    Ranks that Lightning starts get them in an environment variable, ranks that torchrun starts through its store. With another launcher every rank
    resolves its own flags, and `compare` reports differences.
    """

    def __init__(self) -> None:
        self._first = rank_zero_only.rank == 0
        self._changes: dict[str, Any] = {}
        self._store = _store()

    def receive(self) -> dict[str, Any] | None:
        """What rank 0 changed in its flags; None if this rank has to resolve its own.

        Raises:
            UserError: rank 0 does not answer.
        """
        if self._first or not (self._store or os.environ.get(_RESOLVED)):
            return None
        if told := os.environ.get(_RESOLVED):
            return json.loads(told)
        try:
            return json.loads(self._store.get("flags"))
        except RuntimeError as error:  # torch 2's DistError is one
            raise UserError(
                f"rank {rank_zero_only.rank}: no flags received from rank 0 ({str(error).splitlines()[0]}); see the messages of rank 0 for the reason"
            ) from error

    def send(self, flags: TrainConfig, resolved: TrainConfig) -> None:
        """On rank 0: tell the other ranks what was changed in the flags."""
        if not self._first:
            return
        before = dataclasses.asdict(flags)
        self._changes = {key: value for key, value in dataclasses.asdict(resolved).items() if value != before[key]}
        if self._store:
            self._store.set("flags", json.dumps(self._changes))

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Ranks that are started in this block receive the flags."""
        before = os.environ.get(_RESOLVED)
        os.environ[_RESOLVED] = json.dumps(self._changes)
        try:
            yield
        finally:
            if before is None:
                del os.environ[_RESOLVED]
            else:
                os.environ[_RESOLVED] = before


def _store() -> Any:
    """torchrun's key-value store, which its processes reach before they are connected; None without one."""
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
    """What must be the same on all ranks, from a run, its manifest and its model: JSON values by name."""
    weights = [[name, list(strategy.shape(p)), str(p.dtype), p.requires_grad] for name, p in model.named_parameters()]
    found = {f"--{name}": value for name, value in dataclasses.asdict(run.flags).items() if name not in _OWN}
    found |= {"model": manifest["model"], "precision": manifest["precision"]}
    files = ["data", "validation"]
    files += ["base"] if run.flags.load_model else []  # a new base is on rank 0 alone
    files += ["adapter"] if run.adapter and run.adapter.lora_load else []
    for key in files:
        found[key] = {name: x for name, x in (manifest.get(key) or {}).items() if name not in ("prefix", "path")}
    found["torch"] = manifest["stack"].get("torch")
    found["weights' shapes and types"] = hashlib.sha256(json.dumps(weights).encode()).hexdigest()
    return json.loads(json.dumps(found))


def compare(mine: dict[str, Any]) -> None:
    """Compare the `facts` of all ranks after they have connected; called by every rank.

    Raises:
        UserError: on every rank, if one differs from rank 0. The ranks are disconnected.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if wrong := [
            f"{key}: {theirs.get(key)}, rank 0: {value}"
            for key, value in everyone[0].items()
            if theirs.get(key) != value
        ]:
            strategy.leave_process_group()
            raise UserError(
                f"rank {rank} would train something else than rank 0. "
                + "; ".join(wrong)
                + ". Start every rank with the same command, the same"
                " versions and the same files; where a flag is auto, give its value (such as --precision fp32)"
            )
