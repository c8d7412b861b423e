"""Lightning, to be imported from here: without what it brings and training does not use (a quarter of the process; LOG.md).

torchmetrics, which it imports, would import transformers, matplotlib and with them much else; torch's counter of operations triton; its logger wandb.
"""

import logging
import os

from rwkv import unused

logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)  # it would remark that triton is not there
with unused.absent("transformers", "matplotlib", "triton", "wandb"):
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DeepSpeedStrategy
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

if "RANK" not in os.environ and (os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0") != "0":
    # Until it is connected Lightning knows the rank within this machine alone, and there would be a rank 0 on every machine.
    rank_zero_only.rank = max(1, rank_zero_only.rank)

__all__ = ["DeepSpeedStrategy", "pl", "rank_zero_only"]
