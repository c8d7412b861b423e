"""The manifest of a binidx, P.json: its tokenizer, source files and the converter's flags."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rwkv.config import ConvertConfig
from rwkv.data.binidx import MANIFEST, Dataset, mask_path
from rwkv.data.tokenizer import LARGEST_ID, VOCAB_SIZE, HFTokenizer, WorldTokenizer
from rwkv.errors import UserError
from rwkv.files import sha256

FORMAT = 1
# Flags that do not affect the output's contents.
LOCAL = {"input", "output_prefix", "shard", "workers", "ray", "force", "merge"}
# total bytes of the sources up to which they are hashed (takes a second or two)
_MAX_HASHED = 1 << 30


class SourceFile(Protocol):
    """The attributes of rwkv.data.convert.source_file.Source that the manifest records."""

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> int: ...

    @property
    def mtime_ns(self) -> int: ...

    @property
    def stored(self) -> str | Path: ...


def path_of(prefix: str | Path) -> Path:
    """Path of the manifest of a binidx."""
    return Path(f"{prefix}.json")


def flags_of(config: ConvertConfig) -> dict[str, Any]:
    """The converter's flags that affect the output's contents."""
    return {name: value for name, value in vars(config).items() if name not in LOCAL}


def describe(
    tokenizer: Mapping[str, Any] | None,
    sources: Sequence[SourceFile],
    flags: Mapping[str, Any],
    splits: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The part of a manifest that is known before conversion. `splits`: which splits of a dataset
    were used and omitted.
    """
    hashed = sum(source.size for source in sources) <= _MAX_HASHED
    return {
        "kind": MANIFEST,
        "format": FORMAT,
        "tokenizer": tokenizer,
        "flags": dict(flags),
        "splits": dict(splits) if splits else None,
        "sources": [
            {
                "path": str(source.path),
                "size": source.size,
                "mtime_ns": source.mtime_ns,
                "sha256": sha256(source.stored) if hashed else None,
            }
            for source in sources
        ],
    }


def tokenizer_of(tokenizer: WorldTokenizer | HFTokenizer, vocab_file: str = "") -> dict[str, Any]:
    """A tokenizer's entry: name, number of tokens, end-of-document id, and the SHA-256 of the
    vocabulary file if one was given.
    """
    given = vocab_file if isinstance(tokenizer, HFTokenizer) else ""
    return {
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "sha256": sha256(given) if given else None,
    }


def write(path: Path, described: Mapping[str, Any], documents: int, tokens: int, counted: int | None) -> None:
    """Write a manifest. `counted`: tokens that contribute to the loss; None without a mask."""
    whole = {**described, "documents": documents, "tokens": tokens, "counted": counted}
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def load(data: Dataset) -> dict[str, Any] | None:
    """The manifest of an open binidx; None if there is none, as with files of upstream's tool.

    Raises:
        UserError: it is corrupt, or describes other data, or a loss mask that is missing.
    """
    path = path_of(data.prefix)
    found = read(data.prefix)
    if found and (found["documents"], found["tokens"]) != (len(data), len(data.tokens)):
        raise UserError(
            f"{path}: describes {found['documents']:,} documents with {found['tokens']:,} tokens, but {data.prefix}.bin contains"
            f" {len(data):,} with {len(data.tokens):,}; it belongs to another conversion: convert again, or remove it"
        )
    if found and found["counted"] is not None and data.mask is None:
        raise UserError(
            f"{mask_path(data.prefix)}: no such file, but {path} says that a loss mask was written, with which {found['counted']:,} of"
            f" {found['tokens']:,} tokens contribute to the loss. Copy the mask too, or convert again; to train on all tokens, remove {path}"
        )
    return found


def read(prefix: str | Path) -> dict[str, Any] | None:
    """The manifest of a prefix; None if there is none, or the JSON file is something else. Raises
    UserError if it is corrupt.
    """
    path = path_of(prefix)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: the manifest of the data is corrupt ({error}); convert again, or remove it"
        ) from error
    if not isinstance(found, dict) or found.get("kind") != MANIFEST:
        return None
    if found.get("format") != FORMAT:
        raise UserError(
            f"{path}: a manifest of version {found.get('format')!r}, but this program reads version {FORMAT}; update the program"
        )
    tokenizer, splits = found.get("tokenizer"), found.get("splits") or {}
    valid = (
        {"tokenizer", "counted"} <= found.keys()
        and isinstance(splits, dict)
        and all(_is_texts(splits.get(name, [])) for name in ("used", "omitted"))
        and all(isinstance(found.get(name), int) for name in ("documents", "tokens"))
        and isinstance(found.get("counted"), int | None)
        and isinstance(found.get("paired", False), bool)
        and isinstance(found.get("flags"), dict)
        and isinstance(found.get("sources"), list)
        and all(isinstance(source, dict) and isinstance(source.get("path"), str) for source in found["sources"])
        and (tokenizer is None or isinstance(tokenizer, dict))
        and (
            tokenizer is None
            or (isinstance(tokenizer.get("name"), str) and isinstance(tokenizer.get("vocab_size"), int))
        )
    )
    if not valid:
        raise UserError(
            f"{path}: the manifest of the data is corrupt (an entry is missing or has the wrong type); convert again, or remove it"
        )
    return found


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def paired(data: Dataset) -> bool:
    """Whether the documents are preference pairs, by the manifest: chosen and rejected answers
    alternate.

    Raises:
        UserError: the manifest is corrupt, or describes other data.
    """
    return bool((load(data) or {}).get("paired"))


def tokenizer_file(data: Dataset) -> str:
    """Path of the tokenizer.json that the data was tokenised with, if it still exists unchanged;
    else "".
    """
    try:
        found = load(data)
    except UserError:  # reported by callers that need the manifest
        return ""
    digest = ((found or {}).get("tokenizer") or {}).get("sha256")
    path = (found or {}).get("flags", {}).get("vocab_file")
    return path if digest and isinstance(path, str) and Path(path).is_file() and sha256(path) == digest else ""


def convert_config(found: Mapping[str, Any] | None, source: str, given: Mapping[str, Any]) -> ConvertConfig:
    """The config to convert `source` like the data: flags of its manifest, if any, overridden by
    `given`.
    """
    known = {
        name: value
        for name, value in (found or {}).get("flags", {}).items()
        if name in ConvertConfig.__dataclass_fields__
    }
    if found and isinstance(found.get("key"), str):
        known["jsonl_keys"] = found["key"]
    return ConvertConfig(**{**known, **given, "input": source})


def check_vocabulary(data: Dataset, vocab_size: int, pretrained: bool) -> None:
    """Check that the data was tokenised for the model's vocabulary.

    Args:
        vocab_size: of the model.
        pretrained: the model's weights come from a checkpoint. A new model may have a larger
            vocabulary than the tokenizer.

    Raises:
        UserError: the data was tokenised for another vocabulary, even if all its ids are below
            `vocab_size`.
    """
    found = load(data)
    if not found or not (tokenizer := found["tokenizer"]):
        return
    name, entries = tokenizer["name"], tokenizer["vocab_size"]
    if name == WorldTokenizer.name:
        fits = vocab_size > LARGEST_ID
    else:  # models may pad their vocabulary to a multiple of up to 512, or lack a few added tokens
        padded = -(-entries // 512) * 512
        fits = entries * 0.99 <= vocab_size and (vocab_size <= padded or not (pretrained or vocab_size == VOCAB_SIZE))
    if fits:
        return
    if vocab_size == VOCAB_SIZE:
        model, how = "the vocabulary of World models", "without --tokenizer_type"
    else:
        model, how = (
            f"a vocabulary of {vocab_size:,}",
            "with --tokenizer_type HFTokenizer --vocab_file and the model's tokenizer.json",
        )
    raise UserError(
        f"{data.prefix}: was tokenised with {name} ({entries:,} tokens), but the model has {model}, in which these ids are other tokens."
        f" Convert the text again, {how}, or train a model with this tokenizer. (If they do match, remove {path_of(data.prefix)})"
    )


def summary(found: Mapping[str, Any] | None) -> str:
    """One line about a manifest, for a terminal."""
    if not found:
        return "no manifest: not written by this converter, tokenizer unknown"
    tokenizer, sources = found["tokenizer"], found["sources"]
    by = f"tokenizer {tokenizer['name']} ({tokenizer['vocab_size']:,} tokens)" if tokenizer else "tokenizer unknown"
    names = ", ".join(source["path"] for source in sources[:3]) + (
        f" and {len(sources) - 3:,} more" if len(sources) > 3 else ""
    )
    return f"{by}, from {names or 'no file'}" + (
        f"; splits: {format_splits(found['splits'])}" if found.get("splits") else ""
    )


def format_splits(splits: Mapping[str, Any]) -> str:
    """Which splits were used, and which omitted."""
    omitted = ", ".join(splits.get("omitted", []))
    return ", ".join(splits.get("used", [])) + (f" (omitted: {omitted})" if omitted else "")
