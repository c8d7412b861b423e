"""What `evaluate` scores: parts of binidx datasets, or files that are converted first."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv.config import ConvertConfig, EvaluateConfig
from rwkv.data import provenance
from rwkv.data.binidx import Dataset, document_prefix, index_path
from rwkv.data.convert import pipeline
from rwkv.data.token_stream import Stream, split
from rwkv.data.tokenizer import VOCAB_SIZE, HFTokenizer, WorldTokenizer
from rwkv.errors import UserError

_MAX_VALUES = 200  # of the field given as --by


@dataclass(frozen=True)
class Input:
    """Documents to score, as one row of the table."""

    name: str
    data: Dataset
    stream: Stream


def check(c: EvaluateConfig) -> None:
    """Raise UserError for flags about the data that are missing or incompatible."""
    if c.data_file and c.run:
        raise UserError("--data_file and --run both specify the data: pass only one of them")
    if not (c.data_file or c.run or c.tasks):
        raise UserError("nothing to evaluate: pass --data_file, --run or --tasks")
    if not 0 <= c.val_split < 1:
        raise UserError(f"--val_split must be at least 0 and less than 1; it is {c.val_split}")
    files = _parts(c.data_file)
    if c.val_split and (not files or any(not index_path(path).exists() for path in files)):
        raise UserError("--val_split divides a binidx: pass the prefix of one as --data_file, or omit it")
    if c.by and (not files or any(not path.endswith(".jsonl") for path in files)):
        raise UserError(f"--by {c.by} is a field of .jsonl files: pass them as --data_file, or omit it")


def of_run(manifest: dict[str, Any], folder: Path) -> list[Input]:
    """The validation set of a run with this manifest.

    Raises:
        UserError: it has none.
    """
    flags = manifest["flags"]
    options = {"separator": flags.get("doc_sep", -1), "chatml": bool(flags.get("chatml_mask"))}
    if not (flags.get("doc_training") or flags.get("doc_training_seq") or flags.get("doc_reset")):
        options["separator"] = -1
    if entry := manifest.get("validation"):
        data = Dataset(entry["prefix"])
        return [Input(f"{folder}: {entry['prefix']}", data, Stream(data, **options))]
    if share := flags.get("val_split"):
        data = Dataset(manifest["data"]["prefix"])
        _, spans = split(data, share, flags["ctx_len"])
        return [Input(f"{folder}: --val_split {share:g}", data, Stream(data, spans, **options))]
    raise UserError(f"{folder}: this run has no validation set (--val_split or --val_file); pass --data_file instead")


def of_files(c: EvaluateConfig, temporary: Path) -> list[Input]:
    """The inputs of --data_file. Files other than binidx are converted into the folder
    `temporary`.

    Raises:
        UserError: a file cannot be read.
    """
    found = []
    for number, path in enumerate(_parts(c.data_file)):
        if index_path(path).exists():
            data = Dataset(path)
            # the context length matters only if the part is shorter than it
            spans = split(data, c.val_split, 1)[1] if c.val_split else None
            found.append(Input(Path(path).name, data, Stream(data, spans)))
            continue
        if not c.by and not Path(path).exists():
            raise UserError(f"{path}: no such file, nor a binidx ({index_path(path)})")
        files = _by_field(Path(path), c.by, temporary / f"{number}") if c.by else [(Path(path).name, Path(path))]
        for i, (name, file) in enumerate(files):
            data = _converted(c, file, temporary / f"{number}-{i}", path)
            found.append(Input(name, data, Stream(data)))
    if c.by and len({one.name for one in found}) < len(found):
        raise UserError(f"--by {c.by}: several files contain the same value; put them into one .jsonl file")
    return found


def decoder_of(data: Dataset, vocab_size: int, vocab_file: str) -> WorldTokenizer | HFTokenizer | None:
    """The tokenizer of a dataset, to count bytes; None if it is unknown."""
    if path := vocab_file or provenance.tokenizer_file(data):
        return HFTokenizer(path)
    tokenizer = (provenance.read(data.prefix) or {}).get("tokenizer")
    world = tokenizer is None or tokenizer["name"] == WorldTokenizer.name
    return WorldTokenizer(encodes=False) if world and vocab_size == VOCAB_SIZE else None


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _converted(c: EvaluateConfig, file: Path, prefix: Path, shown: str) -> Dataset:
    config = ConvertConfig(
        input=str(file),
        output_prefix=str(prefix),
        mask=c.mask,
        workers=1,
        vocab_file=c.vocab_file,
        tokenizer_type="HFTokenizer" if c.vocab_file else "RWKVTokenizer",
        dtype="int32" if c.vocab_file else "uint16",
    )
    try:
        pipeline.convert(config)
        return Dataset(document_prefix(prefix, "text"))
    except UserError as error:
        raise UserError(str(error).replace(str(file), shown)) from error


def _by_field(path: Path, field: str, folder: Path) -> list[tuple[str, Path]]:
    """Divide a .jsonl file by the value of a field: (value, file) in the order of appearance.

    Raises:
        UserError: a record lacks the field, or it has too many values.
    """
    folder.mkdir()
    names: dict[str, Path] = {}
    try:
        with open(path, "rb") as source:
            for number, raw in enumerate(source, 1):
                if not raw.strip():
                    continue
                try:
                    value = json.loads(raw)[field]
                except (ValueError, KeyError, TypeError, IndexError):
                    raise UserError(
                        f"{path}, line {number}: not a JSON object with the field {field} (--by {field})"
                    ) from None
                name = value if isinstance(value, str) else json.dumps(value)
                if name not in names and len(names) == _MAX_VALUES:
                    raise UserError(
                        f"{path}: --by {field} has more than {_MAX_VALUES} different values; use another field"
                    )
                with open(names.setdefault(name, folder / f"{len(names)}.jsonl"), "ab") as out:
                    out.write(raw if raw.endswith(b"\n") else raw + b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return list(names.items())
