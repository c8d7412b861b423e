"""What a run trains on: a binidx, or what becomes one in the folder of the run first."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from rwkv.config import ConvertConfig, TrainConfig
from rwkv.data import apart, foreign, provenance
from rwkv.data.binidx import Dataset
from rwkv.errors import UserError
from rwkv.model import Sizes
from rwkv.train.lightning import rank_zero_only

_KINDS = ("binidx", "numpy", *foreign.TEXTS)
_ELSE = {
    "uint16": "rows of --my_sample_len ids: write each as a document of a binidx, and give --doc_training 1 with its length less 1 as --ctx_len",
    "wds_img": "images: models of text alone are trained here",
}


def check(c: TrainConfig) -> None:
    """Raises UserError for a kind of data that there is not, or where there is no file."""
    if c.data_type not in _KINDS:
        raise UserError(
            f"--data_type {c.data_type} is not one of {', '.join(_KINDS)}; {_ELSE.get(c.data_type, 'convert it with scripts/convert.py')}"
        )
    if not c.data_file and c.data_type != "dummy":
        raise UserError("--data_file is missing: a binidx prefix, or a .jsonl file")
    if c.my_pile_stage and c.data_type != "binidx":
        raise UserError(
            f"--my_pile_stage {c.my_pile_stage} wants a binidx, and --data_type is {c.data_type}; convert it with scripts/convert.py"
        )


def with_vocabulary(c: TrainConfig) -> TrainConfig:
    """The flags, with the size of its vocabulary where a text brings its own. Raises UserError if another was given."""
    if c.data_type not in foreign.TEXTS:
        return c
    size = len(foreign.vocabulary(c.data_type, c.data_file))
    if c.vocab_size not in (0, size):
        raise UserError(
            f"--vocab_size {c.vocab_size}, and {c.data_file or c.data_type} has {size} different characters; leave the flag out"
        )
    return replace(c, vocab_size=size)


def open_data(c: TrainConfig, sizes: Sizes, folder: Path, reuse: bool = False) -> Dataset:
    """The binidx to train on; anything else becomes one in `folder` first, unless `reuse` finds that done. Ids outside the vocabulary are refused."""
    prefix = c.data_file
    if make := _maker(c, sizes, folder):
        prefix = str(folder / "data_text_document")
        if rank_zero_only.rank == 0 and not (reuse and Path(f"{prefix}.idx").exists()):
            if c.devices * c.num_nodes > 1 and "LOCAL_RANK" in os.environ:  # each by itself would look for what only this one makes
                raise UserError(
                    f"{c.data_file or c.data_type}: a launcher has started all processes, and they cannot wait for it to become a binidx; make one"
                    f" first, with scripts/convert.py or a run of one process, and give it as --data_file"
                )
            if Path(f"{prefix}.bin").exists() and not (c.overwrite or c.epoch_begin):
                raise UserError(f"{prefix}.bin exists already; train on it with --data_file {prefix}, or give --overwrite to convert anew")
            make(prefix)
    return _checked(Dataset(prefix), c, sizes)


def open_validation(c: TrainConfig, sizes: Sizes) -> Dataset | None:
    """The binidx of --val_file; None without one. Ids outside the vocabulary are refused."""
    if not c.val_file:
        return None
    data = Dataset(c.val_file)
    if os.path.samefile(f"{data.prefix}.bin", f"{c.data_file}.bin" if os.path.exists(f"{c.data_file}.bin") else os.devnull):
        raise UserError(f"--val_file {c.val_file} is --data_file: its loss would be that of training; give other data, or --val_split 0.01")
    return _checked(data, c, sizes)


def _checked(data: Dataset, c: TrainConfig, sizes: Sizes) -> Dataset:
    """The data, whose ids are in the model's vocabulary. Raises UserError if one is not."""
    provenance.check_vocabulary(data, sizes.vocab_size, bool(c.load_model))
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


def _maker(c: TrainConfig, sizes: Sizes, folder: Path) -> Callable[[str], object] | None:
    """What makes a binidx of this prefix out of data_file; None if it is one."""
    if c.data_type in foreign.TEXTS:
        return lambda prefix: foreign.characters_to_binidx(c.data_type, c.data_file, prefix, folder / "vocab.json")
    if c.data_type == "numpy":
        return lambda prefix: foreign.array_to_binidx(c.data_file, prefix)
    if not c.data_file.endswith(".jsonl"):
        return None
    if sizes.vocab_size < 65530:
        raise UserError(
            f"{c.data_file}: would be tokenised for World (ids to 65529), and the model has {sizes.vocab_size} words; convert it for that model"
        )
    return lambda prefix: _converted(c.data_file, prefix)


def _converted(path: str, prefix: str) -> None:
    for line in apart.convert(ConvertConfig(input=path, output_prefix=prefix.removesuffix("_text_document"), force=True)):
        print(line, flush=True)
