"""Imports from Lightning, and a correct rank_zero_only.rank on several machines."""

import os

from rwkv.errors import UserError

for _name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):  # Lightning reads them when imported
    if not (_value := os.environ.get(_name, "0")).isdecimal():
        raise UserError(f"{_name}={_value} in the environment is not the number of a process; unset it")

import pytorch_lightning as pl  # noqa: E402
from pytorch_lightning.strategies import DeepSpeedStrategy  # noqa: E402
from pytorch_lightning.utilities.rank_zero import rank_zero_only  # noqa: E402

if "RANK" not in os.environ and (os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0") != "0":
    # before the process group is initialised, Lightning uses the local rank: each machine would
    # have a rank 0
    rank_zero_only.rank = max(1, rank_zero_only.rank)

__all__ = ["DeepSpeedStrategy", "pl", "rank_zero_only"]
