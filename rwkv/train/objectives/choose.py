"""The objectives by their names for --objective."""

from rwkv.config import TrainConfig
from rwkv.train.objectives.dpo import DPO
from rwkv.train.objectives.language_model import LanguageModel
from rwkv.train.objectives.objective import Objective


def of(c: TrainConfig) -> Objective:
    """The objective that the flags choose."""
    return DPO(c) if c.objective == "dpo" else LanguageModel(c)
