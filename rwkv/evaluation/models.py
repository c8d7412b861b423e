"""The models that `evaluate` compares: load and score them in turn."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from rwkv import adapter_files, checkpoint
from rwkv.config import EvaluateConfig
from rwkv.data import provenance
from rwkv.data.progress_bar import progress_bar
from rwkv.errors import UserError
from rwkv.evaluation import harness
from rwkv.evaluation.inputs import Input, decoder_of
from rwkv.evaluation.scores import documents, score
from rwkv.evaluation.table import Evaluated
from rwkv.generate import matrices_dtype
from rwkv.memory import machine
from rwkv.models import RWKV


def check(c: EvaluateConfig) -> list[Evaluated]:
    """The models to evaluate, in the order of the tables.

    Raises:
        UserError: flags are missing or incompatible, or a checkpoint or adapter does not exist.
    """
    paths, adapters = ([x.strip() for x in text.split(",") if x.strip()] for text in (c.model, c.lora))
    if not paths:
        raise UserError("--model is missing: the checkpoint to evaluate")
    if adapters and len(paths) > 1:
        raise UserError("--lora with several models: pass the base of the adapters as the only --model")
    if c.lora_alpha and not adapters:
        raise UserError("--lora_alpha needs an adapter: pass --lora, or omit --lora_alpha")
    for name, minimum in (("micro_bsz", 1), ("ctx_len", 0), ("limit", 0), ("num_fewshot", -1)):
        if getattr(c, name) < minimum:
            raise UserError(f"--{name} must be at least {minimum}; it is {getattr(c, name)}")
    machine.check_accelerator(c.accelerator)
    if c.output and (Path(c.output).suffix != ".json" or os.path.isdir(c.output)):
        raise UserError(f"--output {c.output}: pass the name of a .json file")
    for path in paths:
        checkpoint.sizes_of(checkpoint.read_tensors(path), path)
    for path in adapters:  # before anything is scored: the first may take hours
        adapter_files.inspect_adapter(path, paths[0], c.lora_alpha or None)
    names = _short([*paths, *adapters])
    found = [Evaluated(names[path], path) for path in paths]
    return [*found, *(Evaluated(f"+ {names[path]}", paths[0], path) for path in adapters)]


def check_vocabularies(entries: Sequence[Evaluated], data: Sequence[Input]) -> None:
    """Raise UserError if data was tokenised for another vocabulary than a model's."""
    for path in dict.fromkeys(entry.model for entry in entries) if data else ():
        vocab_size = checkpoint.sizes_of(checkpoint.read_tensors(path), path).vocab_size
        for item in data:
            try:
                provenance.check_vocabulary(item.data, vocab_size, True)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error


def evaluate(c: EvaluateConfig, entry: Evaluated, data: Sequence[Input]) -> Evaluated:
    """Load the model of an entry, and fill in its results.

    Raises:
        UserError: the data does not fit the model's vocabulary.
    """
    model, dtype = _load(c, entry)
    for item in data:
        decoder = decoder_of(item.data, model.sizes.vocab_size, c.vocab_file)
        eod = decoder.eod if decoder else 0
        try:
            with progress_bar(len(item.stream), f"{entry.name}, {item.name}", " tokens", 0.5) as bar:
                found = score(model, documents(item.stream), decoder, eod, c.micro_bsz, c.ctx_len, dtype, bar.update)
        except UserError as error:
            raise UserError(f"{item.name}: {error}") from error
        if not found.tokens:
            raise UserError(
                f"{item.name}: no token contributes to the loss; check its loss mask with scripts/inspect_data.py,"
                " or convert it with --mask none"
            )
        entry.scores[item.name] = found
    if c.tasks:
        entry.tasks = harness.run(c, model, dtype)
    return entry


def _load(c: EvaluateConfig, entry: Evaluated) -> tuple[RWKV, torch.dtype | None]:
    gpu = machine.use_gpu(c.accelerator)
    device = "cuda" if gpu else "cpu"
    stored = checkpoint.read_tensors(entry.model).get("head.weight", torch.empty(0)).dtype
    dtype = matrices_dtype(c.dtype, stored, gpu)
    if not entry.lora:
        return checkpoint.load_model(entry.model, device, matrices=dtype), dtype
    model, _ = adapter_files.load_tuned(entry.model, entry.lora, c.lora_alpha or None, matrices=dtype)
    return model.to(device), dtype


def _short(paths: Sequence[str]) -> dict[str, str]:
    """File names, or as much of the paths as distinguishes them."""
    for parts in range(1, 9):
        names = {path: "/".join(Path(path).parts[-parts:]) for path in paths}
        if len(set(names.values())) == len(set(paths)):
            return names
    return {path: path for path in paths}
