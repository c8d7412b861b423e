"""What a run starts from: its model, its adapter, its data."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from rwkv import checkpoint, compat, lora
from rwkv.config import ConvertConfig, LoRAConfig, TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert import convert
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.model import RWKV, Sizes
from rwkv.model.init import initialise

NEW_BASE = "rwkv-base.pth"  # of LoRA on a new model


def make_model(c: TrainConfig) -> RWKV:
    """From load_model, with flags that disagree refused; else new, by upstream's rules."""
    given = {name: getattr(c, name) for name in ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn") if getattr(c, name)}
    if c.load_model:
        model = checkpoint.load_model(c.load_model, dtype=None if _frozen(c) == torch.bfloat16 else torch.float32)  # None: as it is stored
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
    initialise(model, emb_scale=c.lr_init, frozen=isinstance(c, LoRAConfig) and c.lora)
    return model


def _frozen(c: TrainConfig) -> torch.dtype:
    """What frozen weights are kept in."""
    if not (isinstance(c, LoRAConfig) and c.lora):
        return torch.float32
    alone, gpu = c.devices * c.num_nodes == 1, torch.cuda.is_available() and c.accelerator != "cpu"
    kept = c.precision if c.lora_base == "auto" else c.lora_base
    if not (alone or gpu or compat.gloo_sends_bf16()):
        kept = "fp32"
    return torch.bfloat16 if kept == "bf16" else torch.float32


def adapt(model: RWKV, c: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """Inject LoRA if the run is one; what the adapter's manifest will say of it. A new model, which is then its base, is to be
    found in `folder` (see `keep_base`)."""
    if not (isinstance(c, LoRAConfig) and c.lora):
        return None
    parts = [part.strip() for part in c.lora_parts.split(",") if part.strip()]
    try:
        lora.inject(model, parts, c.lora_r, c.lora_alpha, c.lora_dropout)
    except ValueError as error:
        raise UserError(f"--lora_parts {c.lora_parts} --lora_r {c.lora_r}: {error}") from error
    lora.mark_trainable(model, parts)
    lora.store_frozen(model, _frozen(c))
    if c.lora_load:
        said = checkpoint.read_manifest(c.lora_load).get("alpha")  # upstream's adapters do not say it: the flag then does
        tensors, known = checkpoint.inspect_adapter(c.lora_load, c.load_model or None, c.lora_alpha if said is None else None)
        flags = {"lora_r": c.lora_r, "lora_alpha": c.lora_alpha, "lora_parts": ",".join(lora.same_parts(parts))}
        for flag, theirs in zip(flags, (known["r"], known["alpha"], ",".join(known["parts"])), strict=True):
            if flags[flag] != theirs:
                raise UserError(f"{c.lora_load}: trained with --{flag} {theirs}, and this run has {flags[flag]}; give the same")
        checkpoint.load_adapter(model, c.lora_load, tensors, parts)
    base = {"base": c.load_model, "base_sha256": sha256(c.load_model)} if c.load_model else {"base": str(folder / NEW_BASE)}
    return {"r": c.lora_r, "alpha": c.lora_alpha, "parts": parts, **base}


def keep_base(model: RWKV, adapter: dict[str, Any], folder: Path) -> None:
    """Write the new model that LoRA was injected into, before it trains: without it the adapter is of no use."""
    path = folder / NEW_BASE
    if not path.exists():
        checkpoint.save_model(path, model, {"step": 0})
    adapter["base_sha256"] = sha256(path)


def open_data(c: TrainConfig, sizes: Sizes, folder: Path, reuse: bool = False) -> Dataset:
    """The binidx to train on; a .jsonl is converted into `folder` first, unless `reuse` finds that done. Ids outside the vocabulary are refused."""
    prefix = c.data_file
    if prefix.endswith(".jsonl"):
        if sizes.vocab_size < 65530:
            raise UserError(
                f"{prefix}: would be tokenised for World (ids to 65529), and the model has {sizes.vocab_size} words; convert it for that model"
            )
        prefix = str(folder / "data_text_document")
        if rank_zero_only.rank == 0 and not (reuse and Path(f"{prefix}.idx").exists()):
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
