"""The flags of the training scripts, as typed dataclasses: name, default, reason. Imports nothing of rwkv.

Names, meanings and defaults are those of the upstream trainers (BlinkDL/RWKV-LM, Blealtan/RWKV-LM-LoRA), so that their command
lines work here. Differences are stated in the docstrings, which --help prints.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class TrainConfig:
    """Training."""

    # what goes in and out
    data_file: str = ""
    """Training data: a binidx prefix (P for P.bin and P.idx), or a .jsonl file, which is converted
    into proj_dir first; for other kinds see data_type."""
    load_model: str = ""
    """Checkpoint to start from (.pth or .safetensors). Model sizes are read from it."""
    load_partial: Literal[0, 1] = 0
    """1: initialise parameters missing from load_model (e.g. extra layers, which start as the
    identity)."""
    proj_dir: str = "out"
    """Output folder of the run: checkpoints rwkv-N.pth after epoch N, metrics.jsonl, train_log.txt,
    loss.png."""
    overwrite: bool = False
    """Start over in a proj_dir that contains a run. By default that run is resumed."""
    allow_changes: bool = False
    """Resume the run in proj_dir although flags or data have changed. By default any change is
    refused, with the old and the new value."""
    data_type: str = "binidx"
    """Format of data_file; not needed for .jsonl files and binidx. numpy: an .npy file of token
    ids. utf-8, utf-16le: text with characters as tokens; vocab_size is their number,
    proj_dir/vocab.json lists them. dummy: generated sums, no file. All are converted to a binidx in
    proj_dir first. (Upstream's default is utf-8.)"""

    # the model
    vocab_size: int = 0
    """Vocabulary size V. 0: from load_model, else 65536 (World)."""
    n_layer: int = 0
    """Number of layers L. 0: from load_model, else 6."""
    n_embd: int = 0
    """Embedding width D. 0: from load_model, else 512."""
    dim_att: int = 0
    """Channels of the time-mix. 0: from load_model, else n_embd."""
    dim_ffn: int = 0
    """Hidden channels of the channel-mix. 0: from load_model, else 4 n_embd."""
    pre_ffn: Literal[0, 1] = 0
    """1: block 0 has a channel-mix instead of a time-mix. Read from load_model if given."""

    # how long
    ctx_len: int = 1024
    """Context length: tokens per sample. No upper limit."""
    tbptt_len: int = 0
    """Truncated BPTT: process each sample in chunks of this many tokens, carrying the state.
    Activation memory scales with the chunk, not with ctx_len; gradients stop at chunk borders. 0:
    off."""
    exact: bool = False
    """With tbptt_len: compute the exact gradient of the whole sample in the same memory; a third
    slower."""
    micro_bsz: int = 12
    """Samples per batch and device (micro-batch size)."""
    accumulate_grad_batches: int = 1
    """Number of batches whose gradients are accumulated for one optimizer step. The schedule counts
    optimizer steps (upstream's counts batches, so its learning rate decays that many times too
    slowly)."""
    epoch_steps: int = 1000
    """Batches per epoch, whatever the size of the data."""
    epoch_count: int = 500
    """Number of epochs, counted from epoch 0. (Upstream's trainer never stops by itself.)"""
    my_exit: int = 99999999
    """Stop after epoch N, but keep the learning-rate schedule of the full run."""
    epoch_begin: int = 0
    """Number of the first epoch: N + 1 to continue from rwkv-N.pth with a new optimizer."""
    epoch_save: int = 5
    """Save a checkpoint every N epochs, and at the end."""
    save_every: int = 0
    """Save a resumable training state every N optimizer steps (last two kept in proj_dir/resume).
    0: choose N so that saving takes about 2% of the run time. A state is also saved with every
    checkpoint, and on Ctrl-C and SIGTERM."""
    max_steps: int = 0
    """Stop after this many optimizer steps. 0: run until epoch_count."""
    magic_prime: int = 0
    """Prime sampling: a prime p ≡ 2 (mod 3), at most tokens / ctx_len; every p consecutive samples
    use each of p contexts once. -1: the largest such prime, which covers all of the data. 0:
    contexts start at random offsets."""
    my_pile_shift: int = 0
    """Prime sampling: offset of the first context, in tokens. -1: same as 0."""
    my_random_steps: int = 0
    """Prime sampling: draw the first N - 1 samples (across all devices) at random offsets. (Counts
    samples despite its upstream name.)"""
    my_pile_stage: Literal[0, 1, 2, 3, 4] = 0
    """Upstream's pretraining procedure. 1: write initial weights to rwkv-init.pth and exit; with
    load_model, resize its vectors and vocabulary by linear interpolation. 2, 3: continue from the
    newest rwkv-N.pth in proj_dir with prime sampling, in epochs of 40320 samples until the data is
    used; sets load_model, epoch_begin, epoch_steps, epoch_count and magic_prime. 2: time_mix,
    time_decay and time_first use five times the learning rate. 4: as 3, at random offsets. 0:
    off."""
    random_seed: int = -1
    """Random seed. -1: a new seed for each run, which is reported and stored."""

    # documents (m8than's modes) and masks
    doc_reset: Literal[0, 1] = 0
    """1: reset the state at the start of each document, so that documents do not influence each
    other; the first token of a document is then no target. 0: one continuous stream, as
    upstream."""
    doc_training: Literal[0, 1] = 0
    """1: samples are whole documents, reshuffled in each pass and padded to ctx_len; padding does
    not contribute to the loss. Documents longer than ctx_len + 1 tokens are skipped; their number
    is reported at the start."""
    doc_training_seq: Literal[0, 1] = 0
    """1: as doc_training, in file order, sharded over the devices."""
    doc_sep: int = 0
    """Token id that also ends a document, for doc_training and doc_reset. -1: document boundaries
    come from the index only."""
    min_ctx_len: int = 0
    """doc_training: join documents until a sample has this many tokens. 0: ctx_len / 4. The least
    padding: ctx_len."""
    chatml_mask: Literal[0, 1] = 0
    """1: only answers contribute to the loss: the tokens after 50279 187, up to and including 50278
    (ChatML with the 20B vocabulary). Not needed for chats converted by scripts/convert.py, which
    writes a loss mask (P_text_mask.bin, one byte per token) that is used without a flag."""
    val_split: float = 0.0
    """Fraction of the documents used for validation instead of training, the same in every run;
    reported as val_loss in metrics.jsonl. With few long documents, the last fraction of the tokens.
    0: no validation."""
    val_file: str = ""
    """A separate binidx (prefix) for validation, instead of val_split. Its loss mask and the
    document flags apply as for data_file."""
    val_every: int = 0
    """Compute the validation loss every N optimizer steps. It is always computed at the end of an
    epoch and of the run."""
    val_samples: int = 256
    """Number of validation samples, evenly spaced and always the same. 0: all."""

    # the optimizer
    lr_init: float = 6e-4
    """Initial learning rate. The embedding of a new model is uniform in ± lr_init."""
    lr_final: float = 1e-5
    """Final learning rate, reached by exponential decay from lr_init; by linear decay if either is
    0."""
    warmup_steps: int = -1
    """Optimizer steps of linear warm-up, from 20% of the learning rate; also applies to a constant
    learning rate (in the LoRA fork only to a decaying one)."""
    my_pile_edecay: int = 0
    """Epochs before the learning rate starts to decay."""
    my_exit_tokens: int = 0
    """Cosine decay over this many tokens, after which the run ends. Negative: the mean of cosine
    and exponential decay."""
    beta1: float = 0.9
    """Adam's β₁."""
    beta2: float = 0.99
    """Adam's β₂."""
    adam_eps: float = 1e-8
    """Adam's ε."""
    weight_decay: float = 0.0
    """AdamW weight decay, applied to matrices only. 0: plain Adam."""
    weight_decay_final: float = -1
    """Final weight decay, reached exponentially. -1: constant."""
    dropout: float = 0.0
    """Dropout of the embedding, and of the output of every time-mix and channel-mix."""
    optimizer: Literal["adam", "adafactor"] = "adam"
    """adafactor: transformers' Adafactor, which stores a row and a column per matrix instead of two
    moments per parameter (no momentum; β₁, β₂ and ε are its own). Its steps differ from Adam's; for
    full fine-tuning that does not fit into memory otherwise."""
    layerwise_lr: Literal[0, 1] = 1
    """1: time_decay uses twice the learning rate, time_first three times."""
    grad_clip: float = 1.0
    """Maximum gradient norm. 0: no clipping."""

    on_nan: Literal["stop", "skip"] = "stop"
    """If the loss or the gradient is NaN or Inf: stop ends the run and reports the step, its batch
    and the last valid state; skip skips the update, and stops after more than 20 skipped steps in a
    row (with Adafactor it synchronises with the GPU in every step)."""

    # the machine
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: use a GPU if there is one."""
    devices: int = 1
    """Number of GPUs, or of processes on a CPU, per machine."""
    num_nodes: int = 1
    """Number of machines."""
    strategy: str = "auto"
    """auto: ddp with several devices, none with one. ddp: also with one device. deepspeed_stage_1,
    2, 3: shard the optimizer state (1), also the gradients (2), also the parameters (3); with
    _offload the optimizer (in stage 3 also the parameters) is in CPU memory. All give the same
    training curve."""
    ds_bucket_mb: int = 200
    """DeepSpeed: size of a communication bucket in millions of elements. Smaller buckets take less
    memory."""
    ds_config: str = ""
    """DeepSpeed: JSON file with additional configuration keys, e.g. {"zero_optimization":
    {"sub_group_size": 100000000}}."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: bf16 if all GPUs (Ampere or later) or the CPU (AVX512-BF16, AMX) support it natively,
    else fp32. Matmuls run in bf16/fp16; trainable weights, gradients, Adam moments, WKV and the
    loss stay in fp32. fp16 uses loss scaling. DeepSpeed keeps bf16/fp16 weights and gradients with
    fp32 master weights, which are saved. The data types in use are reported at the start."""
    grad_cp: Literal[0, 1] = 0
    """1: gradient checkpointing: recompute each block in the backward pass. Less memory, a third
    slower."""

    auto: bool = False
    """Choose micro_bsz, accumulate_grad_batches and grad_cp (on GPUs also the strategy) so that the
    predicted memory fits, without changing the effective batch of micro_bsz samples. The choice is
    reported; scripts/estimate.py shows the prediction."""

    # watching
    wandb: str = ""
    """Weights & Biases project to log to. Without a key (wandb login) the run is logged offline."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard to proj_dir/tensorboard. To view them: pip install
    tensorboard; tensorboard --logdir out."""

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.proj_dir)

    @property
    def world_size(self) -> int:
        """Number of processes, over all machines."""
        return self.devices * self.num_nodes

    @property
    def adapter(self) -> "LoRAConfig | None":
        """The flags of the adapter that is trained; None if all weights are."""
        return None


@dataclass
class LoRAConfig(TrainConfig):
    """LoRA tuning."""

    lora: bool = True
    """Train an adapter; the base model stays unchanged."""
    warmup_steps: int = 0
    """As in training; the LoRA fork's default is 0."""
    lora_load: str = ""
    """Adapter to continue from. A missing file is an error (upstream ignores it silently)."""
    lora_r: int = 8
    """Rank of the adapter."""
    lora_alpha: float = 32
    """The adapter's output is scaled by lora_alpha / lora_r. Stored beside the adapter; merging
    reads it there."""
    lora_dropout: float = 0.01
    """Dropout on the input of the adapter."""
    lora_base: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type of the frozen matrices. auto: bf16 with --precision bf16 (World models are stored
    in it), else fp32."""
    lora_parts: str = "att,ln,time"
    """What is trained, separated by commas: adapters on the matrices of att (key, value,
    receptance) and ffn (key, receptance, value), or on single ones, such as att.output or ffn.key,
    in every block; time parameters (time) and block LayerNorms (ln) directly."""

    @property
    def adapter(self) -> "LoRAConfig | None":
        return self if self.lora else None


@dataclass
class ConvertConfig:
    """Conversion to binidx."""

    input: str = ""
    """What to convert: files, globs and folders, separated by commas. jsonl, json (an array), txt,
    csv, tsv, parquet, arrow, each also with .gz or .zst; folders of the datasets library and of the
    Hub; - or a pipe with input_format. A folder is read in the natural order of its files' names:
    ch2 before ch10, 第二章 before 第十章."""
    input_format: Literal["", "jsonl", "json", "txt", "csv", "tsv", "parquet", "arrow"] = ""
    """Format of the files that input names, where their names do not tell, such as a pipe.
    Compression is recognised."""
    split: str = ""
    """Which splits of a data set to take: train, validation, test or another name, several
    separated by commas, or all. Omitted: train."""
    encoding: str = ""
    """Encoding of text files that are not UTF-8, such as gb18030 (also for GBK), big5, shift_jis,
    utf-16. Files that are UTF-8 are read as such."""
    max_record_mb: int = 1024
    """Largest record (line, element, row, text file) in MiB; a larger one is an error. It has to
    fit into memory several times."""
    output_prefix: str = ""
    """P of P_text_document.bin and .idx. Omitted: the input without its ending."""
    jsonl_keys: str = "text"
    """The key or column of the text. Several, separated by commas, make a pair of files each.
    (Upstream's tool always takes "text".)"""
    append_eod: bool = True
    """End every document with the tokenizer's end-of-document token, as training expects.
    (Upstream's tool does so only if told.)"""
    dtype: Literal["uint16", "int32"] = "uint16"
    """uint16 holds every World and 20B id; int32 gives the bytes of upstream's tool for World,
    twice the size."""
    tokenizer_type: Literal["RWKVTokenizer", "HFTokenizer"] = "RWKVTokenizer"
    """RWKVTokenizer: World, 65536 words. HFTokenizer: the tokenizer.json given as vocab_file, such
    as 20B_tokenizer.json."""
    vocab_file: str = ""
    """The tokenizer.json of HFTokenizer; also --vocab. World's vocabulary comes with the tokenizer
    and need not be given."""
    split_lines: bool = False
    """Every line of a txt file is a document. Without it the whole file is one, and has to fit into
    memory."""
    keep_crlf: bool = False
    r"""Keep the line ends of Windows (\r\n) in txt files. Without it they become \n, as models
    write it."""
    ftfy: bool = False
    """Repair broken Unicode (mojibake) with the ftfy library before tokenising."""
    format: Literal[
        "auto",
        "text",
        "messages",
        "moss",
        "alpaca",
        "dolly",
        "firefly",
        "prompt_completion",
        "prompt_response",
        "query_response",
        "question_answer",
    ] = "auto"
    """What the records are. auto: told by their keys, conversations if the first records are. text:
    text under jsonl_keys, whatever else there is. messages: lists of {role, content} or {from,
    value}. alpaca (BELLE): instruction, input, output. The others likewise, by the keys of the
    name."""
    chat_template: str = ""
    """Conversations become text by this: world ("User: …", blank line, "Assistant: …"; blank lines
    inside a message become line breaks), chatml, or a Jinja file; a loss mask is written to
    P_text_mask.bin. Default: world, or chatml for HFTokenizer, if the records are conversations."""
    mask: Literal["auto", "answers", "none"] = "auto"
    """What contributes to the loss. auto: answers of conversations, and all of plain text. answers:
    also in plain text only what follows "Assistant:", "Answer:", "Response:" and the like at the
    start of a turn. none: everything; no mask is written."""
    on_error: Literal["stop", "skip"] = "stop"
    """stop: a bad record ends the conversion, and nothing is written. skip: it is counted and
    written to P.rejects.jsonl. A damaged or truncated file stops it in any case."""
    workers: int = 0
    """Processes that tokenise; the bytes are the same for any number. 0: one for each core."""
    shard: str = ""
    """i/n, from 0/n to n-1/n: convert only the i-th of n parts, each perhaps on another machine,
    all with the same input and prefix. Of jsonl, split lines, parquet and arrow every shard reads a
    part, other files go whole to one."""
    merge: bool = False
    """Join the finished shards of output_prefix into the files that one run would have made."""
    force: bool = False
    """Replace output that exists."""


@dataclass
class InspectConfig:
    """Inspection of a binidx before training."""

    data_file: str = ""
    """The binidx: P for P.bin and P.idx; a mask beside it is looked at too."""
    ctx_len: int = 1024
    """Context length in tokens; used to compute epoch size and to flag over-long documents."""
    micro_bsz: int = 12
    """Samples per batch; used to compute epoch size."""
    verify: str = ""
    """What it was made from, as given to the converter as input: prove that every document decodes
    to its source, byte for byte."""
    jsonl_keys: str = "text"
    """The key of the text in that. This and the next flags are only needed where no manifest beside
    the data says how it was converted."""
    split_lines: bool = False
    """Every line of a txt file was a document."""
    ftfy: bool = False
    """Broken Unicode was repaired."""
    format: str = "auto"
    """What the records of that are; this and the next two as in the conversion."""
    chat_template: str = ""
    """How conversations became text."""
    mask: str = "auto"
    """What contributes to the loss."""
    on_error: Literal["stop", "skip"] = "stop"
    """skip: bad records were skipped."""
    vocab_file: str = ""
    """The tokenizer.json that the data was made with. Omitted: as the manifest says, or World's
    vocabulary."""
    samples: int = 3
    """Documents to show decoded, spread evenly (World, or with vocab_file)."""
    png: str = ""
    """Picture of the document lengths. Omitted: P_lengths.png."""
    json: bool = False
    """Print the findings as JSON."""


@dataclass
class MergeConfig:
    """Merging an adapter into its base."""

    adapter: str = ""
    """The LoRA adapter (.pth); alpha and base are read from the .json beside it. Several for one
    base, separated by commas, are added."""
    weights: str = ""
    """Weight of each adapter, separated by commas, such as 0.7,0.3. Omitted: 1 each."""
    output: str = ""
    """The merged model."""
    base: str = ""
    """The base model. Omitted: as the adapter's .json says."""
    lora_alpha: float = 0
    """Omitted: as the adapter's .json says. Needed for adapters of upstream's trainer, which does
    not store it."""
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
    """LoRA adapter to put on it, not merged."""
    lora_alpha: float = 0
    """Omitted: as the adapter's .json says."""
    prompt: str = ""
    """Text to continue. Without --prompt and --ask: an interactive chat."""
    ask: str = ""
    """Question to answer, in the World models' format: "User: …", blank line, "Assistant:"."""
    max_tokens: int = 200
    """Most tokens of a continuation or an answer; an answer that is cut off by it is marked."""
    temperature: float = 1.0
    """Above 1 more varied, below 1 more certain, 0: always the likeliest token."""
    top_p: float = 0.85
    """Sample from the likeliest tokens that together have this probability, more than 0 and at most
    1."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that was generated before."""
    frequency_penalty: float = 0.0
    """Subtracted from it for each time that it was generated."""
    penalty_decay: float = 0.996
    """How fast penalties fade: each further token multiplies the count of earlier ones by this,
    from 0 to 1."""
    seed: int = -1
    """-1: different each time."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the matrices are kept in and multiplied in. auto: on a GPU as they are stored, which is
    half the memory of fp32 for most models; on a CPU fp32."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU if there is one."""


@dataclass
class ExportConfig:
    """Export of a model for other programs."""

    model: str = ""
    """Checkpoint to export: a model; merge an adapter first (scripts/merge_lora.py)."""
    output: str = ""
    """A .pth or .safetensors file, or a folder for transformers."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Data type of the weights. keep: as they are."""
    ctx_len: int = 1024
    """Context length for config.json of transformers; the model itself has no limit."""
    check_tokens: int = 64
    """Compare the output with the model on this many random tokens (in fp32: needs 8 bytes per
    parameter). 0: no check."""
    force: bool = False
    """Replace existing output."""


@dataclass
class EstimateConfig:
    """Prediction of the memory that a run takes."""

    load_model: str = ""
    """Checkpoint to read the model's sizes from."""
    model: str = ""
    """Or a published size: 0.1b, 0.4b, 1.5b, 3b, 7b, 14b."""
    n_layer: int = 0
    """Layers L, if neither is given; so the next four. 0: 6."""
    n_embd: int = 0
    """Width D. 0: 512."""
    vocab_size: int = 0
    """Vocabulary V. 0: 65536."""
    dim_att: int = 0
    """Channels of the time-mix. 0: n_embd."""
    dim_ffn: int = 0
    """Channels inside the channel-mix. 0: 4 n_embd."""
    method: Literal["lora", "full"] = "lora"
    """Fine-tune with LoRA, or all weights."""
    lora_r: int = 8
    """Rank of the adapter."""
    lora_parts: str = "att,ln,time"
    """What is trained, as in training."""
    lora_base: Literal["auto", "bf16", "fp32"] = "auto"
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
    """Device of the run. cpu: device and host memory are the same."""
    card: str = ""
    """A GPU, as GB (24) or by name ("RTX 4090", "A100 80GB"): what fits on it, the largest batch
    and context. Omitted: the GPU of this machine. With --accelerator cpu: GB of memory."""
    table: bool = False
    """Print the README's table of all published sizes instead."""
    json: bool = False
    """Print JSON, in bytes."""


@dataclass
class DoctorConfig:
    """The doctor."""

    folder: str = "."
    """Folder that runs will write to."""
    json: bool = False
    """Print the findings as JSON."""


GROUPS = {
    "Essential": (
        "load_model", "data_file", "proj_dir", "epoch_steps", "epoch_count", "lr_init", "lr_final",
        "input", "output_prefix", "adapter", "base", "model", "output", "prompt", "ask", "card", "method",
    ),
    "Length of the run and batch": (
        "ctx_len", "micro_bsz", "accumulate_grad_batches", "max_steps", "tbptt_len", "exact", "epoch_begin", "my_exit",
    ),
    "LoRA": ("lora", "lora_r", "lora_alpha", "lora_dropout", "lora_parts", "lora_load", "lora_base"),
    "Data": (
        "data_type", "doc_reset", "doc_training", "doc_training_seq", "doc_sep", "min_ctx_len", "chatml_mask", "val_split", "val_file", "val_every",
        "val_samples", "magic_prime", "my_pile_shift", "my_random_steps", "random_seed",
    ),
    "Schedule and optimizer": (
        "warmup_steps", "my_exit_tokens", "my_pile_edecay", "optimizer", "beta1", "beta2", "adam_eps", "weight_decay", "weight_decay_final", "dropout",
        "layerwise_lr", "grad_clip", "on_nan",
    ),
    "Saving and continuing": ("epoch_save", "save_every", "overwrite", "allow_changes"),
    "Machine": ("accelerator", "devices", "num_nodes", "strategy", "precision", "grad_cp", "auto", "ds_bucket_mb", "ds_config"),
    "Model": ("vocab_size", "n_layer", "n_embd", "dim_att", "dim_ffn", "load_partial"),
    "Logging": ("wandb", "tensorboard"),
    "Compatibility with the upstream trainers": ("my_pile_stage", "pre_ffn"),
}  # fmt: skip
"""Headings of --help, in this order, and the flags under each; a program lists those that it has."""
