"""Detect whether records are conversations, and choose the chat template that renders them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from rwkv.config import ConvertConfig
from rwkv.data.convert import inputs, preference, schemas
from rwkv.data.convert.jsonl import BadRecord
from rwkv.data.convert.source_file import Source
from rwkv.data.convert.template import Template
from rwkv.errors import UserError

_EXAMINED = 64  # files, and records per file


def template_for(
    config: ConvertConfig, source_list: Sequence[Source], keys: Sequence[str]
) -> tuple[Template | None, str]:
    """The requested chat template, or the default one if records are conversations, None for text;
    and the format of the records: preference if they are pairs, else --format.

    The kind of the records is given by --format, or detected from the first ones.

    Raises:
        UserError: flags that contradict each other or the records.
    """
    if config.format == "text":
        if config.chat_template:
            raise UserError(
                "--format text and --chat_template, which is for chats, are mutually exclusive: omit one of them"
            )
        return None, config.format
    default = "world" if config.tokenizer_type == "RWKVTokenizer" else "chatml"
    first = _first_schema(source_list, keys) if config.format == "auto" else config.format
    if first == schemas.PREFERENCE:
        if list(keys) != ["text"]:
            raise UserError(
                f"--jsonl_keys {config.jsonl_keys}: the records are preference pairs, whose keys are known: omit the flag, or"
                " add --format text to convert each key as text"
            )
        if config.mask == "none":
            raise UserError("--mask none: DPO compares the answers of a pair, which the loss mask marks; omit the flag")
        return Template(config.chat_template or default), first
    if config.chat_template or config.format != "auto" or set(keys) & set(schemas.MESSAGES):
        return Template(config.chat_template or default), config.format
    if keys == ["text"]:
        return (Template(default) if first else None), config.format
    parts = set(keys) & {name for pair in schemas.PAIRS.values() for name in pair}
    if first and (len(parts) > 1 or parts & {pair[0] for pair in schemas.PAIRS.values()}):
        raise UserError(
            f"--jsonl_keys {config.jsonl_keys} would separate questions from answers, but the records are conversations ({first}): omit the flag"
            " to train on the answers, or add --format text to convert each key as text"
        )
    return None, config.format


def _first_schema(source_list: Sequence[Source], keys: Sequence[str]) -> str:
    """The schema of the first conversation among the first records of the files; empty if there is
    none.
    """
    for source in [source for source in source_list if source.kind not in ("txt", "lines")][:_EXAMINED]:
        try:
            schema = next(filter(None, map(_schema, itertools.islice(_records(source, keys), _EXAMINED))), "")
        except UserError:  # reported with its location when the file is converted
            continue
        if schema and schema != "text":
            return schema
    return ""


def _records(source: Source, keys: Sequence[str]) -> Iterator[Any]:
    for chunk in inputs.chunks([source], [*keys, *schemas.FIELDS]):
        yield from (record for _, record in inputs.records(chunk, inputs.lines_of(chunk), keys))


def _schema(record: Any) -> str:
    """The schema of a record: a conversation's, "preference" or "text"; empty if unknown."""
    if isinstance(record, dict) and preference.matches(record):
        return schemas.PREFERENCE
    try:
        found = schemas.conversation(record) if isinstance(record, dict) else None
    except BadRecord:
        return "chat"  # rejected with its location when the file is converted
    return found.schema if found else "text" if isinstance(record, dict) and isinstance(record.get("text"), str) else ""
