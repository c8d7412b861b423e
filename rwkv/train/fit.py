"""One run of training, whatever it trains: check, load, train, save."""

import dataclasses
import logging
import os
import re
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from rwkv import checkpoint, compat, lora
from rwkv.config import ConvertConfig, LoRAConfig, TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert import convert
from rwkv.data.dataset import Documents, HeldOut, Samples
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.model import RWKV, Sizes
from rwkv.model.init import initialise
from rwkv.train import samples, schedule
from rwkv.train.callbacks import Checkpoints, Metrics
from rwkv.train.module import TrainingModule
from rwkv.train.plot import plot

_RUN_FILES = re.compile(r"metrics\.jsonl|train_log\.txt|loss\.png|rwkv-(\d+|final)\.pth(\.json)?")
_HASH_LIMIT = 4 << 30  # bytes of a dataset that are still hashed for the manifest: some seconds


@dataclass(frozen=True)
class Result:
    """What a run made. Losses in nats per token: of the first step, before any update, the mean over the last tenth, and the last held-out one."""

    checkpoint: Path
    steps: int
    first_loss: float
    last_loss: float
    val_loss: float | None = None


def fit(config: TrainConfig) -> Result:
    """Train as the config says. Everything that can be refused is refused before the first step.

    Raises:
        UserError: bad data, checkpoint, adapter, folder or flags.
    """
    _check_flags(config)
    _quiet_lightning()
    # Softmax tails and Adam's fading moments fill up with denormals, which a CPU multiplies ten times more slowly.
    torch.set_flush_denormal(True)
    if config.random_seed < 0:
        config = dataclasses.replace(config, random_seed=_new_seed())
    config = dataclasses.replace(config, my_pile_shift=max(0, config.my_pile_shift))  # upstream writes 0 as -1
    seed = pl.seed_everything(config.random_seed)
    model = _make_model(config)
    adapter = _adapt(model, config)
    folder = Path(config.proj_dir)
    old = _old_run(config, folder)
    data = _open_data(config, model.sizes, folder)
    training, held_out = samples.make(config, data, seed)
    _say(config, model, data, training, held_out)
    for path in old:
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)

    save = _saver(config, folder, model, adapter, data)
    metrics, checkpoints = Metrics(config, folder, held_out), Checkpoints(config, save)
    trainer = _trainer(config, [metrics, checkpoints])
    compat.fit(trainer, TrainingModule(model, training, config))
    if trainer.interrupted:
        _print(
            f"interrupted at step {schedule.first_step(config) + trainer.global_step}"
            + (f"; {folder / checkpoints.last} is saved" if checkpoints.last else "")
        )
        raise KeyboardInterrupt
    if trainer.global_rank == 0:
        plot(
            folder / "metrics.jsonl",
            folder / "loss.png",
            f"{folder.name}: {'LoRA' if adapter else 'all weights'}, {trainer.global_step} steps",
        )
    tail = metrics.losses[-max(1, len(metrics.losses) // 10) :]
    result = Result(folder / checkpoints.last, trainer.global_step, metrics.losses[0], sum(tail) / len(tail), *metrics.held_out_losses[-1:])
    held = "" if result.val_loss is None else f", held out {result.val_loss:.3f}"
    _print(f"done:  loss {result.first_loss:.3f} → {result.last_loss:.3f}{held}; {result.checkpoint}, {folder / 'loss.png'}")
    if adapter:
        _print(f"merge: python scripts/merge_lora.py --adapter {result.checkpoint} --output merged.pth")
        _print(f"talk:  python scripts/generate.py --model {config.load_model} --lora {result.checkpoint}")
    return result


def _new_seed() -> int:
    """A random one; in the other processes of a run the one that Lightning hands on."""
    return int(os.environ.get("PL_GLOBAL_SEED") or 0) if rank_zero_only.rank > 0 else secrets.randbits(31)


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)


def _check_flags(c: TrainConfig) -> None:
    for name in ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "max_steps", "epoch_begin", "grad_clip"):
        if getattr(c, name) < 0:
            raise UserError(f"--{name} must not be negative; it is {getattr(c, name)}")
    if not 0 <= getattr(c, "lora_dropout", 0) < 1 or not (0 <= c.beta1 < 1 and 0 <= c.beta2 < 1):
        raise UserError("--lora_dropout, --beta1 and --beta2 must be at least 0 and less than 1")
    for name in ("ctx_len", "micro_bsz", "accumulate_grad_batches", "epoch_steps", "epoch_count", "epoch_save", "devices", "num_nodes"):
        if getattr(c, name) < 1:
            raise UserError(f"--{name} must be at least 1; it is {getattr(c, name)}")
    if not c.data_file:
        raise UserError("--data_file is missing: a binidx prefix, or a .jsonl file")
    if c.epoch_steps % c.accumulate_grad_batches:
        raise UserError(f"--epoch_steps {c.epoch_steps} must be a multiple of --accumulate_grad_batches {c.accumulate_grad_batches}")
    if schedule.total_steps(c) < 1:
        raise UserError(
            f"nothing to train: --epoch_begin {c.epoch_begin} is not before --epoch_count {c.epoch_count}, or the tokens are spent"
        )
    if c.epoch_begin and not c.load_model:
        raise UserError(f"--epoch_begin {c.epoch_begin} goes on with a run: give its checkpoint with --load_model")
    if isinstance(c, LoRAConfig) and c.lora and c.epoch_begin and not c.lora_load:
        raise UserError(f"--epoch_begin {c.epoch_begin} goes on with a LoRA run: give its adapter with --lora_load")
    if c.my_pile_shift < -1:
        raise UserError(f"--my_pile_shift must be at least 0; it is {c.my_pile_shift}")
    samples.check(c)
    if c.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--accelerator gpu: torch sees no GPU; check nvidia-smi, or leave the flag out to train on the CPU")
    gpu = torch.cuda.is_available() and c.accelerator != "cpu"
    if c.precision == "fp16" and not gpu:
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if c.strategy.startswith("deepspeed"):
        raise UserError(f"--strategy {c.strategy}: DeepSpeed strategies are not offered yet; leave it out, or give ddp for several devices")
    if c.strategy not in ("auto", "ddp", "ddp_find_unused_parameters_false"):
        raise UserError(f"--strategy {c.strategy} is not one of auto, ddp")
    if c.accelerator != "cpu" and 0 < torch.cuda.device_count() < c.devices:
        raise UserError(f"--devices {c.devices}: torch sees {torch.cuda.device_count()} GPUs")
    if isinstance(c, LoRAConfig) and c.lora and not c.load_model:
        raise UserError("LoRA tunes a model that exists: give it with --load_model, or train one with scripts/pretrain.py first")


def _make_model(c: TrainConfig) -> RWKV:
    """From load_model, with flags that disagree refused; else new, by upstream's rules."""
    given = {name: getattr(c, name) for name in ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn") if getattr(c, name)}
    if c.load_model:
        model = checkpoint.load_model(c.load_model)
        wrong = [
            f"--{name} {value}, and it has {getattr(model.sizes, name)}"
            for name, value in given.items()
            if value != getattr(model.sizes, name)
        ]
        if wrong:
            raise UserError(f"{c.load_model}: {'; '.join(wrong)}. Sizes come from the checkpoint: leave these flags out")
        model.grad_cp = bool(c.grad_cp)
        return model
    sizes = {"n_layer": 6, "n_embd": 512, "vocab_size": 65536} | given
    sizes = {"dim_att": sizes["n_embd"], "dim_ffn": 4 * sizes["n_embd"]} | sizes
    model = RWKV(Sizes(**sizes, pre_ffn=bool(c.pre_ffn)), bool(c.grad_cp))
    initialise(model, emb_scale=c.lr_init)
    return model


def _adapt(model: RWKV, c: TrainConfig) -> dict[str, Any] | None:
    """Inject LoRA if the run is one; what the adapter's manifest will say of it."""
    if not (isinstance(c, LoRAConfig) and c.lora):
        return None
    parts = [part.strip() for part in c.lora_parts.split(",") if part.strip()]
    try:
        lora.inject(model, parts, c.lora_r, c.lora_alpha, c.lora_dropout)
    except ValueError as error:
        raise UserError(f"--lora_parts {c.lora_parts} --lora_r {c.lora_r}: {error}") from error
    if c.lora_load:
        said = checkpoint.read_manifest(c.lora_load).get("alpha")  # upstream's adapters do not say it: the flag then does
        tensors, known = checkpoint.inspect_adapter(c.lora_load, c.load_model, c.lora_alpha if said is None else None)
        flags = {"lora_r": c.lora_r, "lora_alpha": c.lora_alpha, "lora_parts": ",".join(sorted(parts))}
        for flag, theirs in zip(flags, (known["r"], known["alpha"], ",".join(sorted(known["parts"]))), strict=True):
            if flags[flag] != theirs:
                raise UserError(f"{c.lora_load}: trained with --{flag} {theirs}, and this run has {flags[flag]}; give the same")
        checkpoint.load_adapter(model, c.lora_load, tensors, parts)
    lora.mark_trainable(model, parts)
    base = {"base": c.load_model, "base_sha256": sha256(c.load_model)}
    return {"r": c.lora_r, "alpha": c.lora_alpha, "parts": parts, **base}


def _old_run(c: TrainConfig, folder: Path) -> list[Path]:
    """Files of an earlier run that --overwrite gives up; they are deleted once nothing can be refused any more."""
    if rank_zero_only.rank > 0 or c.epoch_begin:
        return []
    old = sorted(path for path in folder.glob("*") if _RUN_FILES.fullmatch(path.name))
    if old and not c.overwrite:
        raise UserError(f"{folder} holds a run already ({old[0].name}, …); give another --proj_dir, or --overwrite to start over")
    inputs = {Path(path).resolve() for path in (c.load_model, getattr(c, "lora_load", "")) if path}
    if used := [path for path in old if path.resolve() in inputs]:
        raise UserError(f"--overwrite would delete {used[0]}, which this run starts from; give another --proj_dir")
    return old


def _open_data(c: TrainConfig, sizes: Sizes, folder: Path) -> Dataset:
    prefix = c.data_file
    if prefix.endswith(".jsonl"):
        if sizes.vocab_size < 65530:
            raise UserError(
                f"{prefix}: would be tokenised for World (ids to 65529), and the model has {sizes.vocab_size} words; convert it for that model"
            )
        prefix = str(folder / "data_text_document")
        if rank_zero_only.rank == 0:
            if Path(f"{prefix}.bin").exists() and not (c.overwrite or c.epoch_begin):
                raise UserError(f"{prefix}.bin exists already; train on it with --data_file {prefix}, or give --overwrite to convert anew")
            convert(ConvertConfig(input=c.data_file, output_prefix=str(folder / "data"), force=True))
    data = Dataset(prefix)
    can_hold = np.iinfo(data.tokens.dtype)
    if can_hold.min == 0 and can_hold.max < sizes.vocab_size:  # no id can be wrong: spares a pass over the file
        return data
    smallest, largest = data.id_range()
    if smallest < 0 or largest >= sizes.vocab_size:
        raise UserError(
            f"{data.prefix}.bin: token id {smallest if smallest < 0 else largest}, and the model has a vocabulary of {sizes.vocab_size}; the"
            " data was converted for another tokenizer than the model's"
        )
    return data


def _quiet_lightning() -> None:
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")


def _trainer(c: TrainConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    gpu = torch.cuda.is_available() and c.accelerator != "cpu"
    precision = c.precision if c.precision != "auto" else "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    alone = c.devices * c.num_nodes == 1
    return pl.Trainer(
        accelerator="gpu" if gpu else "cpu" if c.accelerator == "auto" else c.accelerator,
        devices=c.devices,
        num_nodes=c.num_nodes,
        **compat.trainer_options(precision, alone and c.strategy == "auto"),
        max_steps=schedule.total_steps(c),
        max_epochs=-1,
        accumulate_grad_batches=c.accumulate_grad_batches,
        gradient_clip_val=c.grad_clip or None,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _saver(c: TrainConfig, folder: Path, model: RWKV, adapter: dict[str, Any] | None, data: Dataset) -> Callable[[str, int], None]:
    raw = Path(f"{data.prefix}.bin")
    fixed = {
        "tokenizer": "World" if model.sizes.vocab_size == 65536 else None,
        "data": str(data.prefix),
        "data_sha256": sha256(raw) if raw.stat().st_size <= _HASH_LIMIT else None,
        "flags": dataclasses.asdict(c),
    }

    def save(name: str, step: int) -> None:
        if adapter:
            checkpoint.save_adapter(folder / name, model, adapter, {"step": step, **fixed})
        else:
            checkpoint.save_model(folder / name, model, {"step": step, **fixed})

    return save


def _say(c: TrainConfig, model: RWKV, data: Dataset, training: Samples, held_out: HeldOut | None) -> None:
    s = model.sizes
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = "all trained" if trained == every else f"{trained / 1e6:.2f} million trained"
    steps, per_step = schedule.total_steps(c), schedule.tokens_per_step(c)
    order, seen = _order(training), steps * per_step / len(training.stream)
    if isinstance(training, Documents):  # samples are padded
        seen = steps * per_step / c.ctx_len / training.distinct
    masked = ", some masked" if training.stream.masked else ""
    _print(
        f"model: RWKV-4, L{s.n_layer} D{s.n_embd} V{s.vocab_size}, {every / 1e6:.2f} million parameters, {what}\n"
        f"data:  {data.prefix}, {len(data):,} documents, {len(data.tokens):,} tokens{masked}\n"
        + (
            f"held:  {len(held_out.source.stream):,} tokens are held out; a loss reads {held_out.total:,} samples of them\n"
            if held_out
            else ""
        )
        + f"run:   {steps:,} steps of {per_step:,} tokens ({order}, seed {training.seed}); each token is seen about {seen:.2g} times"
    )


def _order(training: Samples) -> str:
    if isinstance(training, Documents):
        packed = training.packed
        left = packed.too_long + packed.too_short
        order = "in order" if training.sequential else "shuffled"
        return f"whole documents in {training.distinct:,} samples, {order}" + (f", {left:,} that do not fit left out" if left else "")
    return f"prime sampling, p = {training.prime}" if training.prime else "at random places"
