"""Open the training data: a binidx, or another file that is first converted to a binidx in the
run's folder.

`<prefix>.source.json` records the source of such a converted copy. A copy is reused only for the
same source. It is not replaced while a run in the folder may need it: other data is converted under
another name.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rwkv import commands
from rwkv.config import ConvertConfig, TrainConfig
from rwkv.data import provenance
from rwkv.data.binidx import Dataset, index_path, mask_path
from rwkv.data.convert import char_level, in_subprocess, sources
from rwkv.errors import UserError
from rwkv.files import fingerprint, write_json
from rwkv.models import Sizes
from rwkv.train.resume import run_manifest
from rwkv.train.runtime.lightning import rank_zero_only

_DOCUMENTS, _RECORD = "_text_document", ".source.json"
_KINDS = ("binidx", "numpy", *char_level.TEXTS)
_NOT_NEEDED = ("jsonl", "json", "sft", "text", "txt", "auto")  # values of other trainers for text files
_CONVERTIBLE = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet", ".arrow")
_ADVICE = {
    "uint16": "convert each row of --my_sample_len ids to a document of a binidx, and use --doc_training 1 with that length minus 1 as --ctx_len",
    "wds_img": "image models are not supported",
}


def check(c: TrainConfig) -> None:
    """Raise UserError if data_type is not supported, or data_file is not of that type."""
    if c.data_type.lower().strip(".") in _NOT_NEEDED:
        raise UserError(
            f"--data_type {c.data_type}: omit the flag; a .jsonl file is recognised by its name and converted when the run starts"
        )
    if c.data_type not in _KINDS:
        raise UserError(
            f"--data_type {c.data_type} is not one of {', '.join(_KINDS)}; {_ADVICE.get(c.data_type, 'convert it with scripts/convert.py')}"
        )
    if not c.data_file and c.data_type != "dummy":
        raise UserError("--data_file is missing: a binidx prefix, or a .jsonl file")
    if c.my_pile_stage and c.data_type != "binidx":
        raise UserError(
            f"--my_pile_stage {c.my_pile_stage} needs a binidx, but --data_type is {c.data_type}; convert it with scripts/convert.py"
        )
    if _kind(c) == "binidx" and not os.path.exists(f"{c.data_file}.idx"):
        raise UserError(f"{c.data_file}: {_no_binidx(c.data_file, '--data_file')}")


def check_validation(c: TrainConfig) -> None:
    """Raise UserError if val_file is not a binidx."""
    if c.val_file and not index_path(c.val_file).exists():
        raise UserError(f"--val_file {c.val_file}: {_no_binidx(c.val_file, '--val_file')}")


def _no_binidx(path: str, flag: str) -> str:
    """Error message if there is no binidx with the prefix given as `flag`: why, and what to do."""
    documents = f"{path}{_DOCUMENTS}"
    if os.path.exists(f"{documents}.idx"):
        return f"no such binidx, but {documents}.idx exists: use {commands.flags(flag, documents)}"
    bare, ending = os.path.splitext(path)
    if ending in (".idx", ".bin") and os.path.exists(f"{bare}.idx"):
        return f"pass the prefix of a binidx, without {ending}: {commands.flags(flag, bare)}"
    if not os.path.exists(path):
        or_jsonl = ", or a .jsonl file" if flag == "--data_file" else ""
        return f"no such data ({path}.idx: no such file); pass the prefix of a binidx{or_jsonl}"
    name, what = Path(path).name.lower(), "a folder" if os.path.isdir(path) else "not a binidx"
    if name.endswith((".npy", ".npz")):
        return (
            "a NumPy file: also pass --data_type numpy (for an .npy file of token ids)"
            if flag == "--data_file"
            else "a NumPy file, which only --data_file can be"
        )
    kind = next((kind for kind in _CONVERTIBLE if any(name.endswith(kind + end) for end in ("", ".gz", ".zst"))), "")
    if kind or os.path.isdir(path):
        what = f"a {name[name.rindex(kind) :]} file" if kind else what
        prefix = path
        while kind and os.path.splitext(prefix)[1].lower() in (*_CONVERTIBLE, ".gz", ".zst"):
            prefix = os.path.splitext(prefix)[0]
        prefix = commands.output(prefix.rstrip("/"))
        convert = commands.command("convert", "--input", path, "--output_prefix", prefix)
        return f"{what}. Convert it first: {convert}; then pass {commands.flags(flag, prefix + _DOCUMENTS)}"
    return f"{what}, and its format cannot be inferred from its name; convert it with scripts/convert.py (jsonl, json, txt, csv, parquet and others)"


def with_vocabulary(c: TrainConfig) -> TrainConfig:
    """Set vocab_size for character-level data, which has its own vocabulary. Raises UserError if
    another one was given.
    """
    if c.data_type not in char_level.TEXTS:
        return c
    size = len(char_level.vocabulary(c.data_type, c.data_file))
    if c.vocab_size not in (0, size):
        raise UserError(
            f"--vocab_size {c.vocab_size}: {c.data_file or c.data_type} has {size} different characters; omit the flag"
        )
    return replace(c, vocab_size=size)


def describe(c: TrainConfig) -> dict[str, Any] | None:
    """Describe a data_file that has to be converted: path, kind, SHA-256, size and time of each
    file; None for a binidx.

    If the file is missing but the run in the folder has a converted copy of it, and `allow_changes`
    is given, the recorded description is returned.

    Raises:
        UserError: the file cannot be read.
    """
    kind = _kind(c)
    if kind == "binidx":
        return None
    folder = c.folder
    before = None if c.overwrite else (run_manifest.read(folder) or {}).get("source")
    try:
        paths = [] if kind == "dummy" else [Path(c.data_file)]
        if kind == "jsonl":
            if os.path.exists(c.data_file) and not os.path.isfile(c.data_file):
                raise UserError(f"{c.data_file}: not a regular file; convert it first with scripts/convert.py")
            paths = [file.path for file in sources.find(c.data_file).sources]
        files = [
            {"path": str(path), "bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns} for path in paths
        ]
        digests = [fingerprint(path) for path in paths]
    except (OSError, UserError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{c.data_file}: ")
        if before and before["path"] == c.data_file and copies(folder, before):
            if c.allow_changes:
                return {**before, "missing": True}
            raise UserError(
                f"{c.data_file}: {why}; the run in {folder} used it. Restore it, or use --allow_changes to continue with the converted copy"
            ) from error
        raise UserError(f"{c.data_file}: {why}") from error
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return {"path": c.data_file, "read_as": kind, "sha256": digest, "files": files}


def copies(folder: Path, source: dict[str, Any] | None = None) -> list[str]:
    """Prefixes of converted copies in a run's folder; with `source`, only those converted from
    it.
    """
    found = []
    for path in sorted(folder.glob(f"data*{_DOCUMENTS}{_RECORD}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            same = source is None or (record["sha256"], record["read_as"]) == (source["sha256"], source["read_as"])
        except (OSError, ValueError, KeyError, TypeError):
            same = source is None
        if same:
            found.append(str(path).removesuffix(_RECORD))
    return found


def files_of(prefix: str) -> list[Path]:
    """The existing files of a converted copy, in an order that is safe for deletion: the index
    first, the record of its source last.
    """
    names = [f"{prefix}.idx", f"{prefix}.bin", str(mask_path(prefix)), f"{prefix}.json", f"{prefix}{_RECORD}"]
    return [Path(name) for name in names if os.path.lexists(name)]


def open_data(c: TrainConfig, sizes: Sizes, source: dict[str, Any] | None = None) -> Dataset:
    """Open the binidx to train on; other data is converted first, unless there is a converted copy.

    Args:
        source: description of the data to convert (see `describe`).

    Raises:
        UserError: the data cannot be read or converted, or has token ids outside the vocabulary.
    """
    prefix = c.data_file
    if source is not None:
        if rank_zero_only.rank == 0:
            _delete_unused_copies(c.folder, source)
        prefix = _copy_prefix(c.folder, source)
        make = _converter(c, sizes)
        if rank_zero_only.rank == 0 and not Path(f"{prefix}.idx").exists():
            if c.world_size > 1 and "LOCAL_RANK" in os.environ:  # the other ranks would not wait for it
                raise UserError(
                    f"{c.data_file or c.data_type}: cannot be converted in a run started by a launcher; convert it first, with"
                    " scripts/convert.py or a run of one process, and pass the binidx as --data_file"
                )
            try:
                # written first, so that the files of a killed conversion are recognised
                write_json(f"{prefix}{_RECORD}", source)
                make(prefix)
            except BaseException:
                for path in files_of(prefix):
                    path.unlink()
                raise
    return _check_ids(Dataset(prefix), c, sizes)


def open_validation(c: TrainConfig, sizes: Sizes) -> Dataset | None:
    """Open the binidx of --val_file; None without one. Raises UserError for token ids outside the
    vocabulary.
    """
    if not c.val_file:
        return None
    data = Dataset(c.val_file)
    if os.path.samefile(
        f"{data.prefix}.bin", f"{c.data_file}.bin" if os.path.exists(f"{c.data_file}.bin") else os.devnull
    ):
        raise UserError(f"--val_file {c.val_file} is the training data; use other data, or use --val_split 0.01")
    return _check_ids(data, c, sizes)


def _check_ids(data: Dataset, c: TrainConfig, sizes: Sizes) -> Dataset:
    """Check that all token ids are in the model's vocabulary, and return the data. Raises UserError
    if not.
    """
    provenance.check_vocabulary(data, sizes.vocab_size, bool(c.load_model))
    limits = np.iinfo(data.tokens.dtype)
    if limits.min == 0 and limits.max < sizes.vocab_size:  # all values are valid
        return data
    smallest, largest = data.id_range()
    if smallest < 0 or largest >= sizes.vocab_size:
        raise UserError(
            f"{data.prefix}.bin: token id {smallest if smallest < 0 else largest} is outside the model's vocabulary of {sizes.vocab_size}; the"
            " data was converted with another tokenizer"
        )
    return data


def _delete_unused_copies(folder: Path, source: dict[str, Any]) -> None:
    """Delete copies of other sources that a first start left, if it failed before the run began."""
    if run_manifest.read(folder) is None and not copies(folder, source):
        for path in [path for prefix in copies(folder) for path in files_of(prefix)]:
            path.unlink()


def _copy_prefix(folder: Path, source: dict[str, Any]) -> str:
    """The prefix of the copy converted from `source`; if there is none, the prefix to use for
    it.
    """
    if found := copies(folder, source):
        return found[0]
    run = run_manifest.read(folder)
    if run and "source" not in run and (old := folder / Path(run["data"]["prefix"]).name).with_suffix(".idx").exists():
        return str(old)  # from a version that did not record sources
    prefix = str(folder / f"data{_DOCUMENTS}")
    return (
        str(folder / f"data-{source['sha256'].removeprefix('blocks:')[:8]}{_DOCUMENTS}") if files_of(prefix) else prefix
    )


def _kind(c: TrainConfig) -> str:
    """How data_file is read: jsonl, or a data_type."""
    return "jsonl" if c.data_type == "binidx" and c.data_file.endswith(".jsonl") else c.data_type


def _converter(c: TrainConfig, sizes: Sizes) -> Callable[[str], object]:
    """A function that converts data_file to a binidx with a given prefix."""
    if c.data_type in char_level.TEXTS:
        return lambda prefix: char_level.characters_to_binidx(c.data_type, c.data_file, prefix, c.folder / "vocab.json")
    if c.data_type == "numpy":
        return lambda prefix: char_level.array_to_binidx(c.data_file, prefix)
    if sizes.vocab_size < 65530:
        raise UserError(
            f"{c.data_file}: would be converted with the World tokenizer (65529 tokens), but the model's vocabulary is {sizes.vocab_size}; convert it"
            " with the model's tokenizer first"
        )
    return lambda prefix: _convert_jsonl(c.data_file, prefix)


def _convert_jsonl(path: str, prefix: str) -> None:
    for line in in_subprocess.convert(
        ConvertConfig(input=path, output_prefix=prefix.removesuffix(_DOCUMENTS), force=True)
    ):
        print(line, flush=True)
