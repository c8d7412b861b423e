"""What `evaluate` scores: parts of binidx datasets, or files that are converted first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv.config import ConvertConfig, EvaluateConfig
from rwkv.data import provenance
from rwkv.data.binidx import Dataset, document_prefix, index_path, mask_path
from rwkv.data.convert import pipeline
from rwkv.data.token_stream import Stream, split, split_pairs
from rwkv.data.tokenizer import VOCAB_SIZE, HFTokenizer, WorldTokenizer
from rwkv.errors import UserError
from rwkv.files import fingerprint

_MAX_VALUES = 200  # values of the field given as --by


@dataclass(frozen=True)
class Input:
    """Documents to score, as one row of the table."""

    name: str
    data: Dataset
    stream: Stream


def check(c: EvaluateConfig) -> None:
    """Raise UserError for flags about the data that are missing or incompatible."""
    if c.data_file and c.run:
        raise UserError("--data_file and --run both select what to score: pass only one of them")
    if not (c.data_file or c.run or c.tasks):
        raise UserError("nothing to evaluate: pass --data_file, --run or --tasks")
    if not 0 <= c.val_split < 1:
        raise UserError(f"--val_split must be at least 0 and less than 1; it is {c.val_split}")
    files = _parts(c.data_file)
    for name in ("mask", "input_format"):
        if getattr(c, name) != getattr(EvaluateConfig, name) and (
            not files or any(index_path(path).exists() for path in files)
        ):
            raise UserError(
                f"--{name} {getattr(c, name)} is for files that are converted, but a binidx has its own tokens and loss mask; omit it"
            )
    for name in ("include_path", "num_fewshot", "limit"):
        if getattr(c, name) != getattr(EvaluateConfig, name) and not c.tasks:
            raise UserError(f"--{name} {getattr(c, name)} is for --tasks: pass it too, or omit --{name}")
    if c.val_split and (not files or any(not index_path(path).exists() for path in files)):
        raise UserError("--val_split divides a binidx: pass the prefix of one as --data_file, or omit it")
    if c.by and (not files or any(index_path(path).exists() for path in files)):
        raise UserError(
            f"--by {c.by} is a field of records, which a binidx does not have: pass files such as .jsonl as --data_file, or omit it"
        )


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
        data = _of_manifest(entry, folder)
        return _rows(f"{folder}: {entry['prefix']}", data, None, **options)
    if share := flags.get("val_split"):
        data = _of_manifest(manifest["data"], folder)
        spans = _validation_part(data, share, flags["ctx_len"])
        return _rows(f"{folder}: --val_split {share:g}", data, spans, **options)
    raise UserError(f"{folder}: this run has no validation set (--val_split or --val_file); pass --data_file instead")


def _of_manifest(entry: dict[str, Any], folder: Path) -> Dataset:
    """The binidx that run.json describes; a copy in the run's folder may have been moved with it.

    Raises:
        UserError: it is missing, or has changed since the run.
    """
    prefix, beside = Path(entry["prefix"]), folder / Path(entry["prefix"]).name
    if not index_path(prefix).exists() and index_path(beside).exists():
        prefix = beside
    data, mask = Dataset(prefix), mask_path(prefix)
    known = {"sha256": f"{prefix}.bin", "index_sha256": f"{prefix}.idx", "mask_sha256": mask if mask.exists() else None}
    for key, path in known.items():
        # manifests of earlier versions lack some of the hashes
        recorded = key in entry if key == "mask_sha256" else entry.get(key)
        if recorded and entry[key] != (fingerprint(path) if path else None):
            raise UserError(
                f"{path or mask}: has changed since the run in {folder}, which validated on other tokens; restore it, or pass it as"
                " --data_file to score it as it is now"
            )
    return data


def of_files(c: EvaluateConfig, temporary: Path) -> list[Input]:
    """The inputs of --data_file. Files other than a binidx are converted into the folder
    `temporary`.

    Raises:
        UserError: a file cannot be read.
    """
    if c.by:
        return _by_value(*_converted(c, c.data_file, temporary / "0"))
    found = []
    for number, path in enumerate(_parts(c.data_file)):
        if index_path(path).exists():
            data = Dataset(path)
            # the context length matters only if the part is shorter than it
            found += _rows(Path(path).name, data, _validation_part(data, c.val_split, 1) if c.val_split else None)
            continue
        if path != "-" and not Path(path).exists():
            raise UserError(
                f"{path}: no such file, nor a binidx ({index_path(path)}); pass documents, or P for P.bin and P.idx"
            )
        data, _ = _converted(c, path, temporary / f"{number}")
        found += _rows(Path(path).name, data)
    return found


def _validation_part(data: Dataset, share: float, ctx_len: int) -> np.ndarray:
    """The spans that training with val_split uses for validation."""
    return (split_pairs(data, share) if provenance.paired(data) else split(data, share, ctx_len))[1]


def _rows(name: str, data: Dataset, spans: np.ndarray | None = None, **options: Any) -> list[Input]:
    """One input; two for preference pairs: the documents with the chosen answers, and those with
    the rejected ones.
    """
    if not provenance.paired(data):
        return [Input(name, data, Stream(data, spans, **options))]
    documents = np.array([data.span(i) for i in range(len(data))], np.int64).reshape(-1, 2, 2)  # of each pair
    if spans is not None:
        inside = np.searchsorted(spans[:, 0], documents[:, 0, 0], "right") - 1  # -1: before the first
        documents = documents[(inside >= 0) & (documents[:, 0, 0] < spans[inside, 1])]
    return [
        Input(f"{name}, {side}", data, Stream(data, documents[:, i])) for i, side in enumerate(("chosen", "rejected"))
    ]


def decoder_of(data: Dataset, vocab_size: int, vocab_file: str) -> WorldTokenizer | HFTokenizer | None:
    """The tokenizer of a dataset, to count bytes; None if it is unknown."""
    if path := vocab_file or provenance.tokenizer_file(data):
        return HFTokenizer(path)
    tokenizer = (provenance.read(data.prefix) or {}).get("tokenizer")
    world = tokenizer is None or tokenizer["name"] == WorldTokenizer.name
    return WorldTokenizer(encodes=False) if world and vocab_size == VOCAB_SIZE else None


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _converted(c: EvaluateConfig, files: str, prefix: Path) -> tuple[Dataset, list[str]]:
    """The documents of files, and for each its value of the field --by."""
    config = ConvertConfig(
        input=files,
        input_format=c.input_format,
        output_prefix=str(prefix),
        mask=c.mask,
        workers=1,
        vocab_file=c.vocab_file,
        tokenizer_type="HFTokenizer" if c.vocab_file else "RWKVTokenizer",
        dtype="int32" if c.vocab_file else "uint16",
    )
    values = pipeline.convert(config, c.by).values
    return Dataset(document_prefix(prefix, "text")), values


def _by_value(data: Dataset, values: list[str]) -> list[Input]:
    """Divide documents by their values, in the order of appearance. Raises UserError if there are
    too many different ones.
    """
    spans: dict[str, list[tuple[int, int]]] = {}
    for i, value in enumerate(values):
        spans.setdefault(value, []).append(data.span(i))
    if len(spans) > _MAX_VALUES:
        raise UserError(
            f"--by: the field has {len(spans):,} different values, more than {_MAX_VALUES}; use another field"
        )
    return [row for name, found in spans.items() for row in _rows(name, data, np.array(found, np.int64))]
