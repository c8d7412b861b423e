"""One run of training, whatever it trains: check, load, train, save."""

import dataclasses
import math
import random
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv import checkpoint, compat
from rwkv.adapters import lora
from rwkv.commands import command, output
from rwkv.config import TrainConfig
from rwkv.files import sha256
from rwkv.memory import estimate, machine
from rwkv.models import RWKV
from rwkv.train import budget, resume_or_start, samples, stages
from rwkv.train.callbacks.checkpointing import Restoring, Saving, checkpoint_name, complete
from rwkv.train.callbacks.memory import Watch
from rwkv.train.callbacks.metrics import Metrics
from rwkv.train.callbacks.signals import Signals
from rwkv.train.checks import check, numbers
from rwkv.train.console import say
from rwkv.train.data_source import describe, open_data, open_validation, with_vocabulary
from rwkv.train.loop import schedule
from rwkv.train.loop.module import TrainingModule
from rwkv.train.report import introduce, types
from rwkv.train.resume import run_manifest, state_files
from rwkv.train.resume.home import Home
from rwkv.train.resume.unchanged import Unchanged, frozen_in
from rwkv.train.runtime import cpu, peers, process, strategy
from rwkv.train.runtime.lightning import pl, rank_zero_only
from rwkv.train.runtime.ranks import Ranks, facts
from rwkv.train.runtime.trainer import make_trainer, on_gpu, precision_of, quiet_lightning, slow_on_gpu
from rwkv.train.setup import adapt, keep_base, make_model


@dataclass(frozen=True)
class Result:
    """What a run made. Losses in nats per token: of the first step, before any update, the mean over the last tenth, and the last held-out one."""

    checkpoint: Path
    steps: int
    first_loss: float
    last_loss: float
    val_loss: float | None = None


@process.restored()
def fit(config: TrainConfig) -> Result:
    """Train as the config says. Everything that can be refused is refused before the first step.

    The folder of the run belongs to this process, and the ranks that it starts, until it returns.

    Raises:
        UserError: bad data, checkpoint, adapter or flags; a folder that cannot be used, or that another process uses.
    """
    numbers(config)
    peers.end_with_parent()
    folder = Path(config.proj_dir)
    with resume_or_start.owned(folder), Home(folder) as home:
        return _fit(config, home)


def _fit(config: TrainConfig, home: Home) -> Result:
    folder, ranks = Path(config.proj_dir), Ranks()
    config = ranks.decide("pile", config, lambda c: stages.apply(c, folder))
    check(config)
    config = with_vocabulary(config)
    quiet_lightning()
    cpu.prepare()
    resting = machine.rss()
    before = resume_or_start.earlier(config, folder)
    config = ranks.decide("auto", config, lambda c: _resolved(c, before))
    seed = _seeded(config.random_seed)
    if config.my_pile_stage == 1:
        return Result(stages.write_initial(config, folder), 0, math.nan, math.nan)
    base = resume_or_start.kept_base(config, folder, before)
    model = make_model(config, base)
    adapter = adapt(model, config, folder)
    plan = budget.plan_of(config, model.sizes, on_gpu(config), config.precision)
    if config.auto:
        config = ranks.decide("memory", config, lambda c: _fitted(c, plan))
        model.grad_cp = bool(config.grad_cp)
        plan = budget.plan_of(config, model.sizes, on_gpu(config), config.precision)
    watch = Watch(plan, resting)
    old = resume_or_start.outdated(config, folder, before)
    source = describe(config, folder)
    run = run_manifest.describe(config, config.precision, model.sizes, source) | {"types": types(config, model)}
    if base and before and adapter:
        run["base"] = keep_base(model, adapter, folder, base)
        before = before | {"base": before["base"] or run["base"]}  # earlier versions did not record it
    elif before and not (config.load_model or before["flags"].get("load_model")):
        before = before | {"base": None}  # killed before its first state: the new base is made again
    resume_or_start.check_source(config, folder, before, run)
    data = open_data(config, model.sizes, folder, source)
    validation = open_validation(config, model.sizes)
    run |= {"data": run_manifest.data_of(data), "validation": run_manifest.data_of(validation) if validation else None}
    training, held_out = samples.make(config, data, seed, validation)
    introduce(config, model, data, training, held_out)
    if (limit := budget.room(plan)) and watch.expected() > limit:
        say(
            f"memory: {watch.expected() / 1e9:.2f} GB a device predicted, and {limit / 1e9:.2f} can be used. {budget.advice(plan, limit)}"
        )
    state = resume_or_start.find(
        config, folder, before, run, {name: p for name, p in model.named_parameters() if p.requires_grad}
    )
    if rank_zero_only.rank == 0:
        resume_or_start.delete(folder, old, data.prefix)
        folder.mkdir(parents=True, exist_ok=True)
        if not before:
            run_manifest.write(folder, run)
        if adapter and not config.load_model and not base:
            run["base"] = keep_base(model, adapter, folder, base)
            if not before:
                run_manifest.write(folder, run)
    save = _saver(home, model, adapter, run)
    if state:
        complete(config, folder, state, save)

    metrics, inputs = Metrics(config, home, watch, held_out), _watched(model, run)
    saving = Saving(config, home, run, save, metrics, inputs)
    signals = Signals(saving.unsaved)
    trainer = make_trainer(config, [watch, Restoring(home, state, run), metrics, saving, signals])
    begin = (state.step, state.samples) if state else None
    module = TrainingModule(model, training, config, begin, facts(config, run, model))
    del state  # its memory
    with (
        ranks.told(),
        peers.starting(),
        watch.explained(),
        peers.explained(config.devices * config.num_nodes),
        inputs.explained(),
    ):
        compat.fit(trainer, module)
    folder = home.now()
    end = schedule.first_step(config) + schedule.total_steps(config)
    if trainer.interrupted:
        say(
            f"stopped in step {module.step + 1:,} without saving. Run the same command to continue from the last state in {state_files.folder_of(folder)}"
        )
        raise KeyboardInterrupt
    if module.step < end:
        if rank_zero_only.rank == 0:
            metrics.picture(now=True)
        say(
            f"stopped at step {module.step:,} of {end:,} and saved ({folder / saving.last}). Run the same command to continue"
        )
        strategy.part()
        signals.exit()
    result = _finish(config, folder, trainer, module, metrics, adapter)
    if watch.peak:
        say(f"memory: {watch.words()}")
    if not strategy.zero(config):  # DeepSpeed holds groups of processes for as long as this process lives
        strategy.part()
    return result


def run(config: TrainConfig) -> None:
    """`fit` as all that this process does: with the run ends its connection to the other processes. Raises UserError as fit."""
    fit(config)
    strategy.part()


def _watched(model: RWKV, run: dict[str, Any]) -> Unchanged:
    """The files that steps read, on rank 0: base model and data, as `run`, the manifest, identifies them."""
    inputs = Unchanged()
    if rank_zero_only.rank == 0:
        if base := run["base"]:
            inputs.watch(Path(base["path"]), base["sha256"], sha256, frozen_in(model, base["path"]))
        for data in filter(None, (run["data"], run["validation"])):
            for path, known in run_manifest.data_files(data):
                inputs.watch(path, known)
    return inputs


def _finish(
    c: TrainConfig,
    folder: Path,
    trainer: pl.Trainer,
    module: TrainingModule,
    metrics: Metrics,
    adapter: dict[str, Any] | None,
) -> Result:
    steps = module.step - schedule.first_step(c)
    if not trainer.global_step:
        say(
            f"nothing left to do: all {steps:,} steps are done. Give a larger --epoch_count or --max_steps to continue, --overwrite to start over"
        )
        if trainer.global_rank == 0:
            metrics.load(module.step)
    if trainer.global_rank == 0:
        metrics.picture(now=True, must=True)
    curve = metrics.curve
    losses = trainer.strategy.broadcast((curve.first_loss, curve.loss.tail(0.1), curve.val_loss))  # rank 0's
    result = Result(folder / checkpoint_name(c, module.step), steps, *losses)
    validation = "" if result.val_loss is None else f", validation loss {result.val_loss:.3f}"
    say(
        f"done:  loss {result.first_loss:.3f} (first step) → {result.last_loss:.3f} (mean of the last 10%){validation};"
        f" {result.checkpoint}, {folder / 'loss.png'}"
    )
    if adapter:
        say(f"merge: {command('merge', '--adapter', result.checkpoint, '--output', output('merged.pth'))}")
        say(f"talk:  {command('generate', '--model', adapter['base'], '--lora', result.checkpoint)}")
    return result


def _saver(
    home: Home, model: RWKV, adapter: dict[str, Any] | None, run: dict[str, Any]
) -> Callable[[str, int, Callable], None]:
    fixed = {
        "tokenizer": "World" if model.sizes.vocab_size == 65536 else None,
        "data": run["data"]["prefix"],
        "data_sha256": run["data"]["sha256"],
        "flags": run["flags"],
    }

    def save(name: str, step: int, gather: Callable[[Iterable[str]], dict[str, Tensor]]) -> None:
        named = dict(model.named_parameters())
        weights = gather(lora.adapter_names(model, adapter["parts"]) if adapter else named)
        if rank_zero_only.rank > 0:
            return
        if adapter:
            checkpoint.save_adapter(home.now() / name, model, adapter, {"step": step, **fixed}, weights)
        else:
            checkpoint.save_model(home.now() / name, model, {"step": step, **fixed}, weights)

    return save


def _resolved(c: TrainConfig, before: dict[str, Any] | None) -> TrainConfig:
    """The flags with the seed and the precision that are left to the program: those of the run that is resumed, if any."""
    seed, precision = c.random_seed, c.precision
    if seed < 0:
        seed = before["flags"]["random_seed"] if before else secrets.randbits(31)
    if precision == "auto":
        precision = before["precision"] if before else precision_of(c)
        if not before and (note := slow_on_gpu(c, precision)):
            say(note)
    return dataclasses.replace(
        c, random_seed=seed, precision=precision, my_pile_shift=max(0, c.my_pile_shift)
    )  # upstream writes 0 as -1


def _fitted(c: TrainConfig, plan: estimate.Plan) -> TrainConfig:
    """The flags with what --auto chooses."""
    c, chosen = budget.choose(c, plan)
    say(f"auto:  {chosen}")
    return c


def _seeded(seed: int) -> int:
    """Seed the generators that a new model's weights come from, on all ranks alike."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed
