"""One run of training, whatever it trains: check, load, train, save."""

import dataclasses
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from rwkv import checkpoint, compat
from rwkv.config import TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.model import RWKV
from rwkv.train import cpu, samples, schedule
from rwkv.train.callbacks import Checkpoints, Metrics
from rwkv.train.checks import check
from rwkv.train.module import TrainingModule
from rwkv.train.plot import plot
from rwkv.train.start import adapt, make_model, open_data
from rwkv.train.trainer import make_trainer, quiet_lightning
from rwkv.train.words import introduce, say

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
    check(config)
    quiet_lightning()
    cpu.prepare()
    if config.random_seed < 0:
        config = dataclasses.replace(config, random_seed=_new_seed())
    config = dataclasses.replace(config, my_pile_shift=max(0, config.my_pile_shift))  # upstream writes 0 as -1
    seed = pl.seed_everything(config.random_seed)
    model = make_model(config)
    adapter = adapt(model, config)
    folder = Path(config.proj_dir)
    old = _old_run(config, folder)
    data = open_data(config, model.sizes, folder)
    training, held_out = samples.make(config, data, seed)
    introduce(config, model, data, training, held_out)
    for path in old:
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)

    save = _saver(config, folder, model, adapter, data)
    metrics, checkpoints = Metrics(config, folder, held_out), Checkpoints(config, save)
    trainer = make_trainer(config, [metrics, checkpoints])
    compat.fit(trainer, TrainingModule(model, training, config))
    if trainer.interrupted:
        say(
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
    say(f"done:  loss {result.first_loss:.3f} → {result.last_loss:.3f}{held}; {result.checkpoint}, {folder / 'loss.png'}")
    if adapter:
        say(f"merge: python scripts/merge_lora.py --adapter {result.checkpoint} --output merged.pth")
        say(f"talk:  python scripts/generate.py --model {config.load_model} --lora {result.checkpoint}")
    return result


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


def _new_seed() -> int:
    """A random one; in the other processes of a run the one that Lightning hands on."""
    return int(os.environ.get("PL_GLOBAL_SEED") or 0) if rank_zero_only.rank > 0 else secrets.randbits(31)
