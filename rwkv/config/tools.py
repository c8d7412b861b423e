"""Flags of the programs that merge, generate, export, estimate and check."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class MergeConfig:
    """Merging an adapter into its base."""

    adapter: str = ""
    """LoRA adapter (.pth or .safetensors); alpha and base are read from its manifest (.json).
    Several adapters for one base, separated by commas, are added."""
    weights: str = ""
    """Weight of each adapter, separated by commas, such as 0.7,0.3. Omitted: 1 for each."""
    output: str = ""
    """File for the merged model."""
    base: str = ""
    """Base model. Omitted: from the adapter's manifest."""
    lora_alpha: float = 0
    """lora_alpha of the adapter. Omitted: from the manifest. Required for adapters of upstream's
    trainer, which have no manifest."""
    check_tokens: int = 64
    """Compare merged with base + adapter on this many random tokens (in fp32: needs 4 bytes per
    parameter). 0: no check."""
    use_gpu: bool = False
    """Compute on the GPU."""
    force: bool = False
    """Replace existing output."""


@dataclass
class GenerateConfig:
    """Generation."""

    model: str = ""
    """Checkpoint to run."""
    lora: str = ""
    """LoRA adapter to apply, without merging."""
    lora_alpha: float = 0
    """lora_alpha of the adapter. Omitted: from its manifest."""
    prompt: str = ""
    """Text to continue. Without prompt and ask: an interactive chat."""
    ask: str = ""
    """Question to answer, in the World models' format: "User: …", blank line, "Assistant:"."""
    think: Literal["none", "fast", "full"] = "none"
    """With ask and in chats, for RWKV-7 G1 models. full: answers begin with the model's thoughts,
    "Assistant: <think>…</think>". fast: an empty thought is inserted, "Assistant: <think></think>".
    none: "Assistant:"."""
    max_tokens: int = 200
    """Maximum number of generated tokens; an answer that is cut off is marked."""
    temperature: float = 1.0
    """Sampling temperature. 0: always the most likely token."""
    top_p: float = 0.85
    """Nucleus sampling: sample from the most likely tokens whose probabilities add up to top_p
    (0 < top_p ≤ 1)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token generated before."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token for each time it was generated."""
    penalty_decay: float = 0.996
    """Decay of the counts behind frequency_penalty, per generated token (0 to 1)."""
    seed: int = -1
    """Random seed of sampling. -1: different each time."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the matrices and matmuls. auto: on a GPU that of the checkpoint, on a CPU
    fp32.
    """
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU if there is one."""


@dataclass
class ExportConfig:
    """Export of a model for other programs."""

    model: str = ""
    """Model checkpoint to export. Merge adapters first (scripts/merge_lora.py)."""
    output: str = ""
    """A .pth or .safetensors file, or a folder for transformers."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Data type of the weights. keep: unchanged."""
    ctx_len: int = 1024
    """Context length for config.json of transformers; the model itself has no limit."""
    check_tokens: int = 64
    """Compare the exported model with the original on this many random tokens (in fp32: needs 8
    bytes per parameter). 0: no check."""
    force: bool = False
    """Replace existing output."""


@dataclass
class EstimateConfig:
    """Prediction of the memory of a run."""

    load_model: str = ""
    """Checkpoint to read the model's sizes from."""
    model: str = ""
    """Instead of load_model: a published size (0.1b, 0.4b, 1.5b, 2.9b, 7.2b, 13.3b; with version
    4: 0.1b, 0.4b, 1.5b, 3b, 7b, 14b; with 5.2: 0.4b, 1.5b, 3b, 7b; with 6: 1.6b, 3b, 7b, 14b)."""
    version: str = ""
    """RWKV version of model, or of n_layer and the following: 4, 5.2, 6 or 7. Omitted: 7."""
    n_layer: int = 0
    """Number of layers L, without load_model and model. 0: 6."""
    n_embd: int = 0
    """Embedding width D. 0: 512."""
    vocab_size: int = 0
    """Vocabulary size V. 0: 65536."""
    dim_att: int = 0
    """RWKV-4 to 6: channels of the time-mix. 0: n_embd."""
    head_size: int = 0
    """RWKV-5 to 7: channels of a head. 0: 64."""
    dim_ffn: int = 0
    """Hidden channels of the channel-mix. 0: 4 n_embd, in RWKV-5 and 6 3.5 n_embd."""
    method: Literal["lora", "full"] = "lora"
    """lora: train an adapter; full: train all weights."""
    lora_r: int = 8
    """Rank of the adapter."""
    lora_parts: str = "att,ln,time"
    """What is trained, as in training."""
    lora_base: Literal["auto", "bf16", "fp32", "nf4", "int8"] = "auto"
    """Data type of the frozen matrices, as in training."""
    optimizer: Literal["adam", "adafactor"] = "adam"
    """As in training."""
    ctx_len: int = 1024
    """Context length: tokens per sample."""
    micro_bsz: int = 12
    """Samples per batch and device."""
    accumulate_grad_batches: int = 1
    """Batches per optimizer step."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "bf16"
    """Data type of matmuls."""
    grad_cp: Literal[0, 1] = 0
    """1: gradient checkpointing."""
    strategy: str = "auto"
    """As in training: auto, ddp, deepspeed_stage_1, 2 or 3, also with _offload."""
    ds_bucket_mb: int = 200
    """As in training."""
    devices: int = 1
    """Devices per machine."""
    num_nodes: int = 1
    """Number of machines."""
    accelerator: Literal["cpu", "gpu"] = "gpu"
    """Device of the run. cpu: device memory is host memory."""
    card: str = ""
    """GPU to plan for, in GB (24) or by name ("RTX 4090", "A100 80GB"): print what fits, and the
    largest batch and context. Omitted: the GPU of this machine. With accelerator=cpu: host memory
    in GB."""
    table: bool = False
    """Print the README's table of all published sizes instead."""
    json: bool = False
    """Print JSON, in bytes."""


@dataclass
class DoctorConfig:
    """Check of this machine."""

    folder: str = "."
    """Folder that runs will write to."""
    json: bool = False
    """Print the findings as JSON."""
