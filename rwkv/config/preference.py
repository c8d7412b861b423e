"""Flags of preference tuning."""

from dataclasses import dataclass
from typing import Literal

from rwkv.config.methods import LoRAConfig


@dataclass
class DPOConfig(LoRAConfig):
    """Preference tuning."""

    objective: Literal["lm", "dpo"] = "dpo"
    """dpo: Direct Preference Optimization (Rafailov et al. 2023) on pairs of a chosen and a
    rejected answer, which scripts/convert.py makes of records with prompt, chosen and rejected. A
    sample is a pair, so two sequences of ctx_len tokens. The reference is the model at the start of
    the run; its log-probabilities are computed then, so that there is no second model in memory.
    lm: next-token cross-entropy."""
    lora: bool = True
    """Train an adapter; the base model stays unchanged. false: train all weights, by default
    with lr_init 1e-6 and lr_final 1e-7."""
    lr_init: float = 5e-5
    """Initial learning rate, lower than in fine-tuning: 5e-6 to 1e-4 with LoRA."""
    lr_final: float = 5e-6
    """Final learning rate, reached by the lr_schedule."""
    micro_bsz: int = 4
    """Pairs per batch and device (micro-batch size)."""
    lora_dropout: float = 0.0
    """Dropout on the input of the adapter."""


@dataclass
class FullDPOConfig(DPOConfig):
    """Preference tuning."""

    lr_init: float = 1e-6
    """Initial learning rate, lower than in fine-tuning."""
    lr_final: float = 1e-7
    """Final learning rate, reached by the lr_schedule."""
