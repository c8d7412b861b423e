"""Imports from Lightning, and a correct rank_zero_only.rank on several machines."""

import os

import pytorch_lightning as pl
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_only

if "RANK" not in os.environ and (os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0") != "0":
    # before the process group is initialised, Lightning uses the local rank: each machine would
    # have a rank 0
    rank_zero_only.rank = max(1, rank_zero_only.rank)

__all__ = ["DeepSpeedStrategy", "pl", "rank_zero_only"]
