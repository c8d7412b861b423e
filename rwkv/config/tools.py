"""Flags of the programs that fetch, merge, generate, export, estimate and check."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class FetchConfig:
    """Fetching a published model."""

    model: str = ""
    """What to fetch: a model of --list (rwkv7-g1-0.4b: the newest file of that size), a file name
    of an official repository or its beginning (rwkv7-g1a-0.4b), owner/repo or owner/repo/file of
    the hub, or the address of the file's page. Omitted: as --list."""
    output: str = "models"
    """Folder for the model. If it is already there, nothing is downloaded and no network is
    needed."""
    newest: bool = False
    """Ask the hub even if the model is already here: fetch a newer file, or compare the SHA-256 of
    the local one. Older files stay, as adapters depend on them."""
    revision: str = ""
    """Branch, tag or commit of the repository. Omitted: the newest."""
    force: bool = False
    """Download again, and replace a file of the same name."""
    list: bool = False
    """Print the known models with their sizes and the memory that training takes."""


@dataclass
class MergeConfig:
    """Merging an adapter into its base."""

    adapter: str = ""
    """LoRA adapter or tuned state (.pth or .safetensors); alpha and base are read from its manifest
    (.json). Several for one base, separated by commas, are added. A tuned state becomes part of the
    merged model (att.time_state)."""
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
    """Merge and compare on the GPU, which must hold the model in fp32; else on the CPU."""
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
    state: str = ""
    """Tuned state (scripts/state.py, or of RWKV-PEFT) with which the text or the chat begins."""
    prompt: str = ""
    """Text to continue. Without prompt and ask: an interactive chat."""
    ask: str = ""
    """Question to answer, in the World models' format: "User: …", blank line, "Assistant:"."""
    prompts: str = ""
    """A .jsonl file to answer instead: one object per line, with a text under "prompt" or "ask", or
    chat messages under "messages", as the converter reads them, also with "tools"."""
    output: str = ""
    """With prompts: the .jsonl file for the answers: the same objects in the same order, with
    "answer" and "finish_reason" ("stop", or "length" if cut off)."""
    compare: bool = False
    """With lora or state, and ask, prompt or prompts: first answer with the model alone, from the
    same seed. In output these are "base_answer" and "base_finish_reason"."""
    batch: int = 16
    """With prompts: number of sequences that are generated at a time."""
    force: bool = False
    """With prompts: replace an existing output."""
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
    """Random seed of sampling. -1: different each time. With prompts it counts up from one to the
    next, so that answers do not depend on batch."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the matrices and matmuls. auto: on a GPU that of the checkpoint, on a CPU
    fp32.
    """
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU if there is one."""


@dataclass
class EvaluateConfig:
    """Evaluation."""

    model: str = ""
    """Checkpoint to evaluate; several, separated by commas, are compared with the first."""
    lora: str = ""
    """LoRA adapters and tuned states of the model, separated by commas; each is compared with the
    model alone."""
    lora_alpha: float = 0
    """lora_alpha of the adapters. Omitted: from their manifests."""
    data_file: str = ""
    """What to score: binidx prefixes or files of documents (txt, jsonl and all others that convert
    reads), separated by commas. Each is a row of the table."""
    input_format: Literal["", "jsonl", "json", "txt", "csv", "tsv", "parquet", "arrow"] = ""
    """Format of the files of data_file if their names do not determine it, or of a pipe (-)."""
    run: str = ""
    """Instead of data_file: the folder of a run (its proj_dir), to score its validation set: its
    val_file, or the part of its data that val_split selects."""
    val_split: float = 0.0
    """Score only the part of a binidx that a run with this val_split uses for validation. 0: all of
    it."""
    by: str = ""
    """A field or column of the files, such as source; each of its values is a row."""
    mask: Literal["auto", "answers", "none"] = "auto"
    """For files that are converted, which tokens count. auto: in conversations the answers, in text
    all. answers: also in text only the answers. none: all. (A binidx has its own loss mask.)"""
    vocab_file: str = ""
    """A tokenizer.json, for models with another vocabulary than World. Omitted for a binidx: from
    its manifest."""
    ctx_len: int = 0
    """Score windows of this many tokens, without the context before a window, as in training. 0:
    the whole document is context; memory does not grow with its length."""
    micro_bsz: int = 8
    """Documents in one forward pass."""
    tasks: str = ""
    """Tasks of lm-evaluation-harness, separated by commas; needs make lm-eval once. Tasks that
    download their data need a network."""
    include_path: str = ""
    """Folder with definitions (.yaml) of your own tasks."""
    num_fewshot: int = -1
    """Solved examples before each question. -1: as the task defines."""
    limit: int = 0
    """Evaluate only the first N questions of each task. 0: all."""
    output: str = ""
    """Also write the results to this .json file."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the matrices and matmuls. auto: on a GPU that of the checkpoint, on a CPU
    fp32."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU if there is one."""


@dataclass
class ExportConfig:
    """Export of a model for other programs."""

    model: str = ""
    """Model to export: a .pth or .safetensors file, or a folder of transformers or
    flash-linear-attention. Omitted: the base named in the manifest of lora."""
    lora: str = ""
    """LoRA adapter to merge into the model, tensor by tensor; also a folder written by peft."""
    lora_alpha: float = 0
    """lora_alpha of the adapter. Omitted: from its manifest."""
    state: str = ""
    """Tuned state to write into the model, which then begins with it. For pth, safetensors and st
    (RWKV-5.2 to 7); other formats cannot store it."""
    output: str = ""
    """File, or folder, to write."""
    format: Literal["auto", "pth", "safetensors", "gguf", "transformers", "fla", "peft", "st", "rwkv.cpp"] = "auto"
    """auto: by the suffix of output: .pth, .safetensors, .gguf, .st or .bin (rwkv.cpp); without a
    suffix a folder: RWKV-4 as transformers, RWKV-7 as fla. gguf: RWKV-6 and 7, for llama.cpp.
    transformers: for RWKV-7 the layout of the official RWKV/RWKV7-* folders. fla: the layout of
    flash-linear-attention, RWKV-7. peft: only the adapter, as a folder for peft."""
    dtype: Literal["keep", "fp32", "bf16", "fp16", "q8_0"] = "keep"
    """Data type of the weights. keep: unchanged if the format supports it (st: fp16; rwkv.cpp: fp16
    instead of bf16). q8_0: 8 bits, only for gguf."""
    ctx_len: int = 1024
    """Context length for config.json of transformers; the model itself has no limit."""
    max_shard_gb: float = 4
    """Folders: split the weights into files of at most this many GB (10⁹ bytes)."""
    check_tokens: int = 64
    """Compare the logits of the exported model with those of the original on this many random
    tokens, in fp32. 0: compare only the weights."""
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
    method: Literal["lora", "state", "full"] = "lora"
    """lora: train an adapter; state: train the initial state; full: train all weights."""
    objective: Literal["lm", "dpo"] = "lm"
    """dpo: preference tuning, whose samples are pairs of sequences."""
    lora_r: int = 8
    """Rank of the adapter: r elements per row and column of each adapted matrix are trained."""
    lora_parts: str = "att,ln,time"
    """What LoRA trains: adapters on the matrices of att, ffn, all-linear or single layers; ln,
    time and state directly (see lora.py --help)."""
    use_dora: bool = False
    """LoRA with DoRA, which also trains the magnitude of every row of the adapted matrices."""
    lora_base: Literal["auto", "bf16", "fp32", "nf4", "int8", "fp8"] = "auto"
    """Data type of the frozen matrices. nf4 takes about a quarter of bf16, int8 and fp8 half. auto:
    bf16 with precision bf16, else fp32."""
    optimizer: Literal["adam", "adamw8bit", "muon", "adafactor"] = "adam"
    """adam: 8 bytes per trained element. adamw8bit: 2, and full fine-tuning keeps no fp32 weights.
    muon: 4 for the matrices of the blocks. adafactor: one number per row and column."""
    release_grads: Literal[0, 1] = 0
    """1: with adamw8bit, each gradient is used and freed in the backward pass, so that they are
    never all in memory; not with accumulation or grad_clip."""
    bf16_copies: Literal[0, 1] = 0
    """1: full fine-tuning in bf16 with adam keeps a bf16 copy of the matrices of linear layers and
    head beside their fp32 weights: 2 more bytes per parameter of these matrices."""
    ctx_len: int = 1024
    """Context length: tokens per sample."""
    micro_bsz: int = 12
    """Samples per batch and device."""
    accumulate_grad_batches: int = 1
    """Batches per optimizer step: a larger effective batch at the memory of one."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "bf16"
    """Data type of matmuls and activations, which take twice the memory in fp32 and tf32."""
    grad_cp: Literal[0, 1] = 0
    """1: gradient checkpointing: the activations of one block at a time, for a third more time."""
    strategy: str = "auto"
    """auto, ddp, or deepspeed_stage_N or deepspeed_stage_N_offload: DeepSpeed shards the optimizer
    (N = 1), also the gradients (2), also the weights (3) over the devices; offload moves them to
    host memory."""
    ds_bucket_mb: int = 200
    """Size of DeepSpeed's communication buckets in millions of elements; smaller ones take less
    memory."""
    devices: int = 1
    """Devices (GPUs) per machine."""
    num_nodes: int = 1
    """Number of machines."""
    accelerator: Literal["cpu", "gpu"] = "gpu"
    """Device of the run. cpu: device memory is host memory."""
    card: str = ""
    """GPU to plan for, in GB (24) or by name ("RTX 4090", "A100 80GB"): print what fits, and the
    largest batch and context. Omitted: the GPU of this machine. With accelerator=cpu: host memory
    in GB."""
    gpu: str = ""
    """Print what can be trained on a GPU of this size, as for card: for each published size (of
    version, if given) and method the longest ctx_len with micro_bsz 1 and the largest micro_bsz
    with ctx_len 1024, with grad_cp 1. Other flags apply."""
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
