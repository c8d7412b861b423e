"""Lightning, to be imported from here: without what it brings and training does not use (a quarter of the process; LOG.md).

torchmetrics, which it imports, would import transformers, matplotlib and with them much else; torch's counter of operations triton; its logger wandb.
"""

import logging

from rwkv import unused

logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)  # it would remark that triton is not there
with unused.absent("transformers", "matplotlib", "triton", "wandb"):
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DeepSpeedStrategy
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

__all__ = ["DeepSpeedStrategy", "pl", "rank_zero_only"]
