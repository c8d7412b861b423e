"""Flags that all kinds of training share, in groups. --help prints a heading for each group.

Names, meanings and defaults are those of the upstream trainers (BlinkDL/RWKV-LM,
Blealtan/RWKV-LM-LoRA), so that their command lines work here. Differences are stated in the
docstrings, which --help prints.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Paths:
    """Model, data and output."""

    load_model: str = ""
    """Checkpoint to start from (.pth or .safetensors). Model sizes are read from it."""
    data_file: str = ""
    """Training data: a binidx prefix (P for P.bin and P.idx), or a .jsonl file, which is converted
    into proj_dir first; for other kinds see data_type."""
    proj_dir: str = "out"
    """Output folder of the run: checkpoints rwkv-N.pth after epoch N, metrics.jsonl, train_log.txt,
    loss.png, and report.html to view in a browser, also during the run."""
    data_type: str = "binidx"
    """Format of data_file; not needed for .jsonl files and binidx. numpy: an .npy file of token
    ids. utf-8, utf-16le: text with characters as tokens; vocab_size is their number,
    proj_dir/vocab.json lists them. dummy: generated sums, no file. All are converted to a binidx in
    proj_dir first. (Upstream's default is utf-8.)"""
    load_partial: Literal[0, 1] = 0
    """1: initialise parameters missing from load_model (e.g. extra layers, which start as the
    identity)."""
    overwrite: bool = False
    """Start over in a proj_dir that contains a run. By default that run is resumed."""
    allow_changes: bool = False
    """Resume the run in proj_dir although flags or data have changed. By default any change is
    rejected, with the old and the new value."""


@dataclass
class ModelSize:
    """Version and size of a new model."""

    version: str = ""
    """RWKV version: 4, 5.2 (or 5), 6 or 7. Omitted: from load_model, else 7."""
    n_layer: int = 0
    """Number of layers L. 0: from load_model, else 6."""
    n_embd: int = 0
    """Embedding width D. 0: from load_model, else 512."""
    vocab_size: int = 0
    """Vocabulary size V. 0: from load_model, else 65536 (World)."""
    dim_att: int = 0
    """RWKV-4 to 6: channels of the time-mix. 0: from load_model, else n_embd."""
    dim_ffn: int = 0
    """Hidden channels of the channel-mix. 0: from load_model, else 4 n_embd; in RWKV-5 and 6
    3.5 n_embd."""
    pre_ffn: Literal[0, 1] = 0
    """RWKV-4: 1: block 0 has a channel-mix instead of a time-mix. Read from load_model if given."""
    head_size: int = 0
    """RWKV-5 to 7: channels of a head, a multiple of 16. 0: from load_model, else 64."""


@dataclass
class Length:
    """Length of the run and batch size."""

    ctx_len: int = 1024
    """Context length: tokens per sample. No upper limit."""
    micro_bsz: int = 12
    """Samples per batch and device (micro-batch size). Lower it if memory does not suffice, and
    raise accumulate_grad_batches by the same factor."""
    accumulate_grad_batches: int = 1
    """Number of batches whose gradients are accumulated for one optimizer step. The schedule counts
    optimizer steps (upstream's counts batches, so its learning rate decays that many times too
    slowly)."""
    epoch_steps: int = 1000
    """Batches per epoch, whatever the size of the data: an epoch is only the interval between
    checkpoints (epoch_save) and the unit of epoch_count."""
    epoch_count: int = 500
    """Number of epochs, counted from epoch 0. (Upstream's trainer never stops by itself.)"""
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
    my_exit: int = 99999999
    """Stop after epoch N, but keep the learning-rate schedule of the full run."""
    tbptt_len: int = 0
    """Truncated BPTT: process each sample in chunks of this many tokens, carrying the state.
    Activation memory scales with the chunk, not with ctx_len; gradients stop at chunk borders. 0:
    off."""
    exact: bool = False
    """With tbptt_len: compute the exact gradient of the whole sample in the same memory; a third
    slower."""


@dataclass
class Sampling:
    """Order of the data."""

    random_seed: int = -1
    """Random seed. -1: a new seed for each run, which is reported and stored."""
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
    time_decay and time_first (in RWKV-5 and 6 time_mix, time_maa, time_decay and time_faaaa, in
    RWKV-7 w0) use five times the learning rate. 4: as 3, at random offsets. 0: off."""


@dataclass
class Documents:
    """Documents and loss masks."""

    doc_reset: Literal[0, 1] = 0
    """1: reset the state at the start of each document, so that documents do not influence each
    other; the first token of a document is then not a target. 0: one continuous stream, as
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
    """doc_training: join documents until a sample has this many tokens. 0: ctx_len / 4. Use ctx_len
    for the least padding."""
    chatml_mask: Literal[0, 1] = 0
    """1: only answers contribute to the loss: the tokens after 50279 187, up to and including 50278
    (ChatML with the 20B vocabulary). Not needed for chats converted by scripts/convert.py, which
    writes a loss mask (P_text_mask.bin, one byte per token) that is used without a flag."""


@dataclass
class Validation:
    """Validation."""

    val_split: float = 0.0
    """Fraction of the documents used for validation instead of training, the same in every run;
    reported as val_loss in metrics.jsonl. If that is fewer than two documents, the last part of the
    tokens is used. 0: no validation."""
    val_file: str = ""
    """A separate binidx (prefix) for validation, instead of val_split. Its loss mask and the
    document flags apply as for data_file."""
    val_every: int = 0
    """Compute the validation loss every N optimizer steps, too. It is always computed at the end of
    an epoch and of the run. 0: only then."""
    val_samples: int = 256
    """Number of validation samples, evenly spaced and always the same. 0: all."""
    keep_best: bool = False
    """Also keep the checkpoint of the lowest validation loss, as rwkv-best.pth in proj_dir."""
    patience: int = 0
    """Early stopping: end the run, with its final checkpoint, after N consecutive validations
    without a new lowest loss. To continue, run the same command with a larger N. 0: off."""


@dataclass
class Optimizer:
    """Learning rate and optimizer."""

    lr_init: float = 6e-4
    """Initial learning rate. Try 1e-4 for LoRA, 1e-5 for full fine-tuning, 6e-4 to pretrain a small
    model; lower it if the loss jumps. The embedding of a new RWKV-4 model is uniform in ± lr_init,
    of a new RWKV-5, 6 or 7 model in ±1e-4."""
    lr_final: float = 1e-5
    """Final learning rate, reached by lr_schedule from lr_init."""
    lr_schedule: Literal["auto", "exp", "linear", "cosine", "wsd", "constant"] = "auto"
    """Learning-rate schedule from lr_init, after warmup_steps and my_pile_edecay, to lr_final
    at the end of epoch_count. auto: upstream's, exponential decay, linear if lr_init or lr_final is
    0, with my_exit_tokens its cosine. exp: exponential. linear. cosine: half a cosine. wsd:
    constant, then linear decay in the last lr_decay_steps. constant: lr_init throughout."""
    lr_decay_steps: int = 0
    """wsd: optimizer steps of the decay. 0: lr_decay_fraction of the run."""
    lr_decay_fraction: float = 0.1
    """wsd: length of the decay as a fraction of the optimizer steps after warm-up."""
    warmup_steps: int = -1
    """Optimizer steps of linear warm-up, as upstream from 20% of the learning rate (RWKV-4) or 1%
    (later versions); also applies to a constant learning rate (in the LoRA fork only to a decaying
    one). -1: none; in a continued stage (my_pile_stage) upstream's 10 or 30."""
    my_pile_edecay: int = 0
    """Epochs before the learning rate starts to decay."""
    my_exit_tokens: int = 0
    """Cosine decay over this many tokens, after which the run ends. Negative: the mean of cosine
    and exponential decay."""
    optimizer: Literal["auto", "adam", "adamw8bit", "muon", "adafactor"] = "auto"
    """auto: that of the resumed run; in a new run adam, or adamw8bit if --auto chooses it.
    adamw8bit: AdamW with the matrices in bf16 (no fp32 copy; updates are rounded up or down at
    random, so that small ones are not lost) and moments in 8 bits: 6 bytes per parameter instead of
    16, for full fine-tuning in less memory. Checkpoints are bf16. Of an adapter only the moments
    are in 8 bits. muon: for pretraining. Muon for
    the linear layers of the blocks (momentum 0.95, made nearly orthogonal in every step), AdamW
    for embedding, head, vectors and low-rank matrices; lr_init and weight_decay as for AdamW, to
    whose size the updates are scaled. 12 bytes per parameter; a step takes as many more FLOPs as
    training on about 4·n_embd tokens, so it suits large batches. adafactor: transformers'
    Adafactor, which stores a row and a column per matrix instead of two moments per parameter (no
    momentum; β₁, β₂ and ε are its own). Its steps differ from Adam's; for full fine-tuning that
    does not fit into memory otherwise."""
    release_grads: Literal[0, 1] = 0
    """1: with adamw8bit, update each parameter in the backward pass and free its gradient: 4 bytes
    per parameter (6 of an adapter). Without clipping (grad_clip 0), accumulation, several devices
    or on_nan skip, which need all gradients."""
    bf16_copies: Literal[0, 1] = 0
    """1: training all weights in bf16, keep a bf16 copy of the matrices of linear layers and head
    beside their fp32 weights; the optimizer's step writes it. 0: they are cast in every forward and
    backward pass. Losses and weights are the same bit for bit. It saves a few percent of the time
    of a step with few tokens, and takes 2 bytes per parameter of these matrices. Only with adam;
    not with DeepSpeed. Checkpoints do not contain it; may change when a run is resumed."""
    beta1: float = 0.9
    """Adam's β₁: decay of the running mean of gradients."""
    beta2: float = 0.99
    """Adam's β₂: decay of the running mean of squared gradients."""
    adam_eps: float = 1e-8
    """Adam's ε, added to the denominator of an update."""
    weight_decay: float = 0.0
    """AdamW weight decay, applied to matrices only. 0: plain Adam."""
    weight_decay_final: float = -1
    """Final weight decay, reached exponentially. -1: constant."""
    dropout: float = 0.0
    """Dropout of the embedding, and of the output of every time-mix and channel-mix. Raise it, for
    example to 0.1, if the validation loss rises while the training loss falls."""
    layerwise_lr: Literal[0, 1] = 1
    """1: time_decay (in RWKV-7 w0) uses twice the learning rate, time_first three times."""
    grad_clip: float = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it. 0: no clipping."""
    on_nan: Literal["stop", "skip"] = "stop"
    """If the loss or the gradient is NaN or Inf: stop ends the run and reports the step, its batch
    and the last valid state; skip skips the update, and stops after more than 20 consecutive
    skipped steps (unless with adam, it synchronises with the GPU in every step)."""


@dataclass
class Machine:
    """Devices and memory."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: use a GPU if there is one."""
    devices: int = 1
    """Number of GPUs, or of processes on a CPU, per machine."""
    num_nodes: int = 1
    """Number of machines. On each, run scripts/launch.sh (see its --help) or torchrun."""
    strategy: str = "auto"
    """auto: ddp with several devices, none with one. ddp: also with one device. deepspeed_stage_1,
    2, 3: shard the optimizer state (1), also the gradients (2), also the parameters (3); with
    _offload the optimizer (in stage 3 also the parameters) is in CPU memory. All give the same
    training curve."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: bf16 if all GPUs of the run (Ampere or later) or the CPU (AVX512-BF16, AMX) support it
    natively, else fp32. Matmuls run in bf16/fp16; trainable weights, gradients, Adam moments, WKV
    and the loss stay in fp32. fp16 uses loss scaling. DeepSpeed keeps bf16/fp16 weights and
    gradients with fp32 master weights, which are saved. The data types in use are reported at the
    start."""
    grad_cp: Literal[0, 1] = 0
    """1: gradient checkpointing: recompute each block in the backward pass. Less memory, a third
    slower."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """On one GPU, capture the forward and backward pass of the blocks once as a CUDA graph and
    replay it in every step, so that Python does not start each kernel: small batches train several
    times as fast. auto: if the other flags allow it and its memory is predicted to fit; with torch
    1.13.1 off. on: end with an error if the other flags exclude it (several devices, DeepSpeed,
    tbptt_len, release_grads). Gradients and activations stay allocated for the whole run."""
    auto: bool = False
    """Choose micro_bsz, accumulate_grad_batches and grad_cp so that the predicted memory fits,
    without changing the effective batch size. If that does not suffice, change these in turn,
    unless the flag is given: strategy (all weights, several GPUs); lora_base int8, then nf4 (LoRA
    on load_model); optimizer adamw8bit (all weights: only in bf16); strategy with offload (GPUs).
    The choice is reported and kept when the run is resumed; scripts/estimate.py shows the
    prediction."""
    ds_bucket_mb: int = 200
    """DeepSpeed: size of a communication bucket in millions of elements. Smaller buckets take less
    memory."""
    ds_config: str = ""
    """DeepSpeed: JSON file with additional configuration keys, e.g. {"zero_optimization":
    {"sub_group_size": 100000000}}."""


@dataclass
class Logging:
    """Logging."""

    wandb: str = ""
    """Weights & Biases project to log to. Without a key (wandb login) the run is logged offline."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard to proj_dir/tensorboard. To view them: pip install
    tensorboard; tensorboard --logdir out."""
    sample_every: int = 0
    """Write samples (greedy decoding) before the first step, every N optimizer steps and at the
    end: to samples.jsonl, and side by side in report.html. Does not affect the training. 0: off."""
    sample_ask: str = ""
    """With sample_every: questions to answer, separated by "|". Omitted: the beginnings of three
    validation documents (without validation, of training documents), up to the first token that
    contributes to the loss, or a quarter of the document."""
