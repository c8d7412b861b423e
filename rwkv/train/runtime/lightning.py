"""The names of Lightning that training uses, and rank 0 of a run on several machines."""

import os

import pytorch_lightning as pl
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_only

if "RANK" not in os.environ and (os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0") != "0":
    # Until processes are connected, Lightning knows the local rank only; every machine would have a rank 0.
    rank_zero_only.rank = max(1, rank_zero_only.rank)

__all__ = ["DeepSpeedStrategy", "pl", "rank_zero_only"]
