"""Flags of training about what is minimised (see rwkv.config.training)."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Objective:
    """What is minimised."""

    objective: Literal["lm", "dpo"] = "lm"
    """lm: next-token cross-entropy. dpo: Direct Preference Optimization (Rafailov et al. 2023) on
    pairs of a chosen and a rejected answer, which scripts/convert.py makes of records with prompt,
    chosen and rejected. A sample is a pair, so two sequences of ctx_len tokens. The reference is
    the model at the start of the run; its log-probabilities are computed then, so that there is no
    second model in memory."""
    dpo_beta: float = 0.1
    """dpo: β, the strength of the penalty for deviating from the reference; smaller values let the
    model deviate more. With dpo_length_norm about 5."""
    dpo_label_smoothing: float = 0.0
    """dpo: the probability that chosen and rejected are swapped in the data (cDPO), below 0.5."""
    dpo_length_norm: Literal[0, 1] = 0
    """dpo: 1: divide the log-probability of an answer by its number of tokens, so that long answers
    are not preferred for their length."""
