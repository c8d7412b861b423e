"""Validate flags, before any input is read."""

import dataclasses
import math

import torch

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.memory import machine
from rwkv.train import data_source, samples
from rwkv.train.loop import schedule
from rwkv.train.runtime import strategy

_AT_LEAST: dict[float, tuple[str, ...]] = {
    1: ("ctx_len", "micro_bsz", "accumulate_grad_batches", "epoch_steps", "epoch_count", "epoch_save", "devices", "num_nodes", "ds_bucket_mb", "lora_r"),
    0: (
        *("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "head_size", "tbptt_len", "max_steps", "epoch_begin", "save_every", "my_exit"),
        *("my_random_steps", "min_ctx_len", "val_every", "val_samples", "my_pile_edecay", "patience", "sample_every", "lr_decay_steps"),
        *("lr_init", "lr_final", "weight_decay", "grad_clip", "adam_eps"),
    ),
    -1: ("warmup_steps", "magic_prime", "my_pile_shift", "random_seed", "weight_decay_final"),
}  # fmt: skip
_LARGEST = 1 << 62  # limit for integers


def check_numbers(c: TrainConfig) -> None:
    """Raise UserError if a numeric flag is out of range, NaN or infinite, or proj_dir is empty.
    Must be called first.
    """
    if not c.proj_dir.strip():
        raise UserError("--proj_dir is empty: pass the folder of the run, or . for the current one")
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or abs(value) > (_LARGEST if isinstance(value, int) else math.inf):
            raise UserError(f"--{field.name} {value}: not a valid number")
    for low, names in _AT_LEAST.items():
        for name in names:
            value = getattr(c, name, low)
            if value < low:
                requirement = (
                    "must not be negative"
                    if low == 0
                    else f"must be at least {max(low, 0) if name == 'my_pile_shift' else low}"
                )
                raise UserError(f"--{name} {requirement}; it is {value}")
    for name in ("lora_dropout", "dropout", "beta1", "beta2", "val_split"):
        if not 0 <= getattr(c, name, 0) < 1:
            raise UserError(f"--{name} must be at least 0 and less than 1; it is {getattr(c, name)}")
    if not getattr(c, "lora_alpha", 1) > 0:
        raise UserError(f"--lora_alpha must be greater than 0; it is {getattr(c, 'lora_alpha', 0)}")
    if c.micro_bsz >= 1 << 31:
        raise UserError(f"--micro_bsz must be less than 2^31; it is {c.micro_bsz}")
    if c.random_seed >= 1 << 32:
        raise UserError(f"--random_seed must be less than 2^32, or -1 for a new one; it is {c.random_seed}")


def check(c: TrainConfig) -> None:
    """Raise UserError for missing flags, and flags incompatible with each other or with this
    machine. Called after `check_numbers`.
    """
    if c.adapter and not c.load_model and not (c.n_layer and c.n_embd):
        raise UserError(
            f"{c.trains} needs a pretrained model: pass it as --load_model, or train one with scripts/pretrain.py first. For a new, random base"
            " (frozen) pass --n_layer and --n_embd"
        )
    if c.adapter and c.adapter.lora_load and not c.load_model:
        raise UserError(
            f"{c.load_flag} {c.adapter.lora_load}: it works with the base that it was trained on only; pass that base as --load_model"
        )
    if c.adapter and c.adapter.quantised and not c.load_model:
        raise UserError(
            f"--lora_base {c.adapter.lora_base} quantises a pretrained model: pass it as --load_model, or omit --lora_base for a new base"
        )
    _check_objective(c)
    data_source.check(c)
    if c.epoch_steps % c.accumulate_grad_batches:
        raise UserError(
            f"--epoch_steps {c.epoch_steps} must be a multiple of --accumulate_grad_batches {c.accumulate_grad_batches}"
        )
    if schedule.total_steps(c) < 1:
        raise UserError(
            f"nothing to train: --epoch_begin {c.epoch_begin} is not before --epoch_count {c.epoch_count}, or --my_exit_tokens has been reached"
        )
    schedule.check(c)
    if c.epoch_begin and not c.load_model:
        raise UserError(f"--epoch_begin {c.epoch_begin} continues a run: pass its checkpoint as --load_model")
    if c.adapter and c.epoch_begin and not c.adapter.lora_load:
        raise UserError(f"--epoch_begin {c.epoch_begin} continues a run: pass its last checkpoint as {c.load_flag}")
    if c.load_partial and (not c.load_model or c.adapter):
        raise UserError("--load_partial 1 completes --load_model in pretraining and full fine-tuning; omit it")
    if c.exact and not c.tbptt_len:
        raise UserError("--exact applies to --tbptt_len only: pass --tbptt_len, the length of a chunk, too")
    samples.check(c)
    data_source.check_validation(c)
    # stage 1 only writes initial weights; upstream's demo-training-prepare.sh gives device and
    # strategy anyway
    if c.my_pile_stage == 1:
        return
    machine.check_accelerator(c.accelerator)
    if c.precision == "fp16" and not machine.use_gpu(c.accelerator):
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    strategy.check(c)
    if c.sample_ask and not c.sample_every:
        raise UserError("--sample_ask needs --sample_every N, the number of steps between two samples")
    if c.sample_every and (sharded := strategy.zero(c)) and sharded.stage == 3:
        raise UserError(
            f"--sample_every {c.sample_every}: with --strategy {c.strategy} no process has all weights to write samples with; use --strategy"
            " deepspeed_stage_2, or omit it"
        )
    check_adamw8bit(c)
    check_muon(c)
    check_bf16_copies(c)
    if c.optimizer == "adafactor" and strategy.zero(c):
        raise UserError(
            f"--optimizer adafactor with --strategy {c.strategy}: Adafactor needs 2-D parameters, and ZeRO flattens them; use --optimizer adam, or a strategy without DeepSpeed"
        )
    if c.accelerator != "cpu" and 0 < torch.cuda.device_count() < c.devices:
        raise UserError(
            f"--devices {c.devices}: torch sees {torch.cuda.device_count()} GPUs; lower it, or check CUDA_VISIBLE_DEVICES"
        )


def _check_objective(c: TrainConfig) -> None:
    """Raise UserError for flags that are incompatible with the objective."""
    if c.objective != "dpo":
        for name in ("dpo_beta", "dpo_label_smoothing", "dpo_length_norm"):
            if getattr(c, name) != getattr(TrainConfig, name):
                raise UserError(f"--{name} applies to --objective dpo only: pass it too, or omit it")
        return
    if not c.load_model:
        raise UserError("--objective dpo compares answers with those of a trained model: pass it as --load_model")
    if c.tbptt_len:
        raise UserError(
            f"--tbptt_len {c.tbptt_len}: the loss of a pair depends on whole answers, so it cannot be computed in chunks; omit it, or use --grad_cp 1"
        )
    if not c.dpo_beta > 0:
        raise UserError(f"--dpo_beta must be greater than 0; it is {c.dpo_beta}")
    if not 0 <= c.dpo_label_smoothing < 0.5:
        raise UserError(f"--dpo_label_smoothing must be at least 0 and less than 0.5; it is {c.dpo_label_smoothing}")


def check_adamw8bit(c: TrainConfig) -> None:
    """Raise UserError for flags that are incompatible with --optimizer adamw8bit or
    --release_grads.
    """
    if c.optimizer != "adamw8bit":
        if c.release_grads:
            raise UserError(
                f"--release_grads 1 needs --optimizer adamw8bit; with --optimizer {c.optimizer} gradients are freed after the step only"
            )
        return
    if strategy.zero(c):
        raise UserError(
            f"--optimizer adamw8bit is not supported with DeepSpeed (--strategy {c.strategy}), which flattens weights and keeps fp32 masters;"
            " use --strategy auto or ddp, or --optimizer adam"
        )
    if c.precision == "fp16":
        raise UserError(
            "--optimizer adamw8bit with --precision fp16: it does not undo the scaling of gradients; use --precision bf16, or fp32 on GPUs without it"
        )
    several = not strategy.is_single_process(c)
    of_matrices = not c.adapter  # an adapter's gradients are fp32
    if several and of_matrices and not machine.use_gpu(c.accelerator) and not compat.gloo_supports_bf16():
        raise UserError(
            "--optimizer adamw8bit: ddp on CPUs averages gradients in bf16, and gloo in this torch version does not support bf16; use one process,"
            " or the modern stack (make venv STACK=modern)"
        )
    if not c.release_grads:
        return
    wrong = {
        f"--grad_clip {c.grad_clip:g} needs the norm of all gradients; pass --grad_clip 0": c.grad_clip > 0,
        f"--accumulate_grad_batches {c.accumulate_grad_batches} adds gradients up; use 1": c.accumulate_grad_batches
        > 1,
        "ddp averages gradients after the backward pass; use one device and --strategy auto": several,
        "--on_nan skip needs all gradients before the first update; use --on_nan stop": c.on_nan == "skip",
    }
    if reason := next((reason for reason, applies in wrong.items() if applies), None):
        raise UserError(f"--release_grads 1 updates weights in the backward pass: {reason}, or omit --release_grads")


def check_muon(c: TrainConfig) -> None:
    """Raise UserError for flags that are incompatible with --optimizer muon."""
    if c.optimizer != "muon":
        return
    if c.adapter:
        raise UserError(
            "--optimizer muon is for training all weights (scripts/pretrain.py, scripts/finetune.py); adapters and states are trained with"
            " Adam: omit it"
        )
    if strategy.zero(c):
        raise UserError(
            f"--optimizer muon is not supported with DeepSpeed (--strategy {c.strategy}), which flattens and shards matrices; use --strategy auto"
            " or ddp, or --optimizer adam"
        )


def check_bf16_copies(c: TrainConfig) -> None:
    """Raise UserError for flags that are incompatible with --bf16_copies; precision and optimizer
    may still be auto.
    """
    if not c.bf16_copies:
        return
    wrong = {
        f"{c.trains} trains no linear layers of the model; use scripts/finetune.py": bool(c.adapter),
        f"with --strategy {c.strategy} DeepSpeed keeps bf16 weights beside fp32 ones anyway": bool(strategy.zero(c)),
        "with --optimizer adamw8bit the matrices are bf16 anyway": c.optimizer == "adamw8bit",
        f"--optimizer {c.optimizer} does not write them; use adam": c.optimizer in ("muon", "adafactor"),
        f"matmuls in {c.precision} do not read them; use --precision bf16": c.precision not in ("auto", "bf16"),
    }
    if reason := next((reason for reason, applies in wrong.items() if applies), None):
        raise UserError(f"--bf16_copies 1: {reason}, or omit --bf16_copies")
