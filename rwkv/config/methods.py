"""Flags of each kind of training: all weights, LoRA, the initial state."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rwkv.config.objective import Objective
from rwkv.config.training import (
    Documents,
    Length,
    Logging,
    Machine,
    ModelSize,
    Optimizer,
    Paths,
    Sampling,
    Validation,
)

QUANTISED_BASES = ("nf4", "int8", "fp8")
"""Values of lora_base that quantise the base."""


@dataclass
class TrainConfig(Logging, Machine, Optimizer, Validation, Documents, Sampling, Length, Objective, ModelSize, Paths):
    """Training."""

    @property
    def folder(self) -> Path:
        """The folder of the run (proj_dir)."""
        return Path(self.proj_dir)

    @property
    def world_size(self) -> int:
        """Number of processes, over all machines."""
        return self.devices * self.num_nodes

    @property
    def sequences(self) -> int:
        """Sequences of ctx_len tokens in a sample."""
        return 2 if self.objective == "dpo" else 1

    @property
    def adapter(self) -> "LoRAConfig | None":
        """The flags of the adapter that is trained; None if all weights are."""
        return None

    @property
    def trains(self) -> str:
        """What is trained: "all weights", "LoRA" or "initial state"."""
        return "LoRA" if self.adapter else "all weights"

    @property
    def load_flag(self) -> str:
        """The flag of the adapter to continue from."""
        return "--lora_load"


@dataclass
class LoRAConfig(TrainConfig):
    """LoRA."""

    lora: bool = True
    """Train an adapter; the base model stays unchanged."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up of the learning rate. 0: none, as in the LoRA fork; try 10
    to 100 if the loss jumps at the start."""
    lora_load: str = ""
    """Adapter to continue from. A missing file is an error (upstream ignores it silently)."""
    lora_r: int = 8
    """Rank of the adapter. A higher rank can learn more, with more memory and a larger file."""
    lora_alpha: float = 32
    """The adapter's output is scaled by lora_alpha / lora_r. Stored beside the adapter; merging
    reads it there."""
    lora_dropout: float = 0.01
    """Probability with which elements of the adapter's input are set to 0 in training, against
    overfitting. 0: none."""
    lora_base: Literal["auto", "bf16", "fp32", "nf4", "int8", "fp8"] = "auto"
    """Data type of the frozen matrices. auto: bf16 with --precision bf16 (World models are stored
    in bf16), else fp32. nf4 (QLoRA: 4 bits, a quarter of bf16) and int8 (half of bf16) quantise
    the matrices of the blocks while load_model is read; slower, and merging uses the original
    weights. fp8 (half of bf16; modern stack, Ada, Hopper and later GPUs) also rounds the inputs of
    the matmuls to 8 bits, which tensor cores multiply at twice the rate of bf16, and their result
    to bf16; never chosen automatically."""
    use_dora: bool = False
    """DoRA: also train the magnitude of every row of the adapted matrices (lora_magnitude_vector),
    as peft. It takes more memory and time than LoRA, and DoRA adapters cannot be added in a
    merge."""
    use_rslora: bool = False
    """rsLoRA: scale the adapter's output by lora_alpha / √lora_r, so that the best learning rate
    depends less on the rank."""
    lora_parts: str = "att,ln,time"
    """What is trained, separated by commas: adapters on the matrices of att (key, value,
    receptance; in RWKV-7 also output, in RWKV-5 and 6 output and gate) and ffn (key, value; before
    RWKV-7 also receptance), on all matrices of the blocks (all-linear), or on single ones, such as
    att.output or ffn.key, in every block;
    directly, the parameters of the time-mix (time; in RWKV-6 and 7 with its low-rank matrices),
    LayerNorms (ln; in RWKV-5 to 7 also ln_x and ln_out), and the state with which documents begin
    (state; see scripts/state.py)."""

    @property
    def adapter(self) -> "LoRAConfig | None":
        return self if self.lora else None

    @property
    def quantised(self) -> str | None:
        """nf4, int8 or fp8, if the base is quantised."""
        return self.lora_base if self.lora_base in QUANTISED_BASES else None

    @property
    def alpha(self) -> float:
        """The adapter's output is scaled by alpha / lora_r."""
        return self.lora_alpha * math.sqrt(self.lora_r) if self.use_rslora else self.lora_alpha


@dataclass
class FinetuneConfig(TrainConfig):
    """Full fine-tuning and state tuning."""

    train_type: Literal["none", "state"] = "none"
    """none: train all weights. state: state tuning, which trains only the state with which the
    model begins a document (att.time_state of every block), while all weights stay frozen; with the
    defaults of scripts/state.py (lr_init 1, lr_final 0.01, warmup_steps 10, doc_reset 1)."""
    state_load: str = ""
    """State tuning: tuned state to continue from."""

    @property
    def adapter(self) -> LoRAConfig | None:
        if self.train_type == "none":
            return None
        # an adapter without matrices: only the part `state`
        shared = {field.name: getattr(self, field.name) for field in fields(TrainConfig)}
        tuned: dict[str, Any] = {"lora_parts": "state", "lora_r": 1, "lora_alpha": 1.0, "lora_dropout": 0.0}
        return LoRAConfig(**shared, **tuned, lora_load=self.state_load)

    @property
    def trains(self) -> str:
        return "initial state" if self.train_type == "state" else "all weights"

    @property
    def load_flag(self) -> str:
        return "--state_load"


@dataclass
class StateConfig(FinetuneConfig):
    """State tuning."""

    train_type: Literal["none", "state"] = "state"
    """state: state tuning, which trains only the state with which the model begins a document
    (att.time_state of every block), while all weights stay frozen. none: train all weights, with
    the defaults of scripts/finetune.py."""
    lr_init: float = 1.0
    """Initial learning rate. State tuning needs a very high one: upstream's guides use 1 → 0.01
    (RWKV-LM), or 0.01 → 0.0001 (RWKV-PEFT). Lower it if the loss jumps. Large models need less."""
    lr_final: float = 0.01
    """Final learning rate, reached by the lr_schedule."""
    warmup_steps: int = 10
    """Optimizer steps of linear warm-up of the learning rate; 10 as in upstream's guide to state
    tuning."""
    doc_reset: Literal[0, 1] = 1
    """1: each document begins with the tuned state, so that documents do not influence each other;
    the first token of a document is then not a target. 0: one continuous stream, as upstream."""
