"""Rank 0 decides for all ranks: before they are connected they take its answers, once they are they compare what they came to.

What a run leaves to the program (a random seed, `--precision auto`, what a run that is resumed had, `--auto`) may come out differently on two
machines, and would then train two different runs, or fail in a collective operation.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.train.runtime import strategy
from rwkv.train.runtime.lightning import rank_zero_only

_DECIDED = "RWKV_RANK_ZERO_DECIDED"  # environment variable for the processes that Lightning starts
_WAIT = timedelta(minutes=30)  # for an answer of rank 0
_RUNS = itertools.count()  # of this process

# Flags that may differ between ranks: where files are (compared by content), what only rank 0 does, what is compared by what it came to.
_OWN = {
    *(
        "proj_dir",
        "data_file",
        "val_file",
        "load_model",
        "lora_load",
        "ds_config",
        "wandb",
        "tensorboard",
        "overwrite",
        "allow_changes",
    ),
    *("accelerator", "auto", "random_seed"),
}

C = TypeVar("C", bound=TrainConfig)


class Ranks:
    """The processes of one run, before they are connected.

    The answers of rank 0 go to the processes that Lightning starts by an environment variable, to those that torchrun started by torchrun's store.
    With another launcher each rank decides by itself, and `compare` finds what differs.
    """

    def __init__(self) -> None:
        self._first = rank_zero_only.rank == 0
        self._decided: dict[str, dict[str, Any]] = {} if self._first else json.loads(os.environ.get(_DECIDED) or "{}")
        self._store = _store()

    def decide(self, name: str, c: C, decision: Callable[[C], C]) -> C:
        """decision(c), or elsewhere than on rank 0 the flags `c` with what rank 0's decision changed in its own.

        Args:
            name: of the decision, the same on all ranks.

        Raises:
            UserError: rank 0 does not answer.
        """
        if not self._first and (name in self._decided or self._store):
            return dataclasses.replace(c, **(self._decided[name] if name in self._decided else self._ask(name)))
        made = decision(c)
        if self._first:
            before = dataclasses.asdict(c)
            self._decided[name] = {
                key: value for key, value in dataclasses.asdict(made).items() if value != before[key]
            }
            if self._store:
                self._store.set(name, json.dumps(self._decided[name]))
        return made

    def _ask(self, name: str) -> dict[str, Any]:
        try:
            return json.loads(self._store.get(name))
        except RuntimeError as error:  # torch 2's DistError is one
            raise UserError(
                f"rank {rank_zero_only.rank}: rank 0 did not say what it trains with ({str(error).splitlines()[0]}); see its messages for why"
            ) from error

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Processes started meanwhile know what was decided."""
        before = os.environ.get(_DECIDED)
        os.environ[_DECIDED] = json.dumps(self._decided)
        try:
            yield
        finally:
            if before is None:
                del os.environ[_DECIDED]
            else:
                os.environ[_DECIDED] = before


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


def facts(c: TrainConfig, run: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What has to be the same on all ranks, by name, out of a run's flags, its manifest and its model: JSON values."""
    weights = [[name, list(strategy.shape(p)), str(p.dtype), p.requires_grad] for name, p in model.named_parameters()]
    found = {f"--{name}": value for name, value in dataclasses.asdict(c).items() if name not in _OWN}
    found |= {"model": run["model"], "precision": run["precision"]}
    for key in (
        "data",
        "validation",
        *(["base"] if c.load_model else []),
        *(["adapter"] if getattr(c, "lora_load", "") else []),
    ):
        found[key] = {name: value for name, value in (run.get(key) or {}).items() if name not in ("prefix", "path")}
    found["torch"] = run["stack"].get("torch")
    found["weights' shapes and types"] = hashlib.sha256(json.dumps(weights).encode()).hexdigest()
    return json.loads(json.dumps(found))


def compare(mine: dict[str, Any]) -> None:
    """Compare the `facts` of all ranks, once they are connected; called by every rank.

    Raises:
        UserError: on every rank, if one differs from rank 0. They are disconnected then.
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
            strategy.part()
            raise UserError(
                f"rank {rank} would train something else than rank 0. "
                + "; ".join(wrong)
                + ". Start every rank with the same command, the same"
                " versions and the same files; where a flag is auto, give its value (such as --precision fp32)"
            )
