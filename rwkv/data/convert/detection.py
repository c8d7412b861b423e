"""Whether records are conversations, and the chat template that makes text of them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from rwkv.config import ConvertConfig
from rwkv.data.convert import inputs, schemas
from rwkv.data.convert.jsonl import BadRecord
from rwkv.data.convert.source_file import Source
from rwkv.data.convert.template import Template
from rwkv.errors import UserError

_LOOKED_AT = 64  # files, and records of each until one says what it is


def template_for(config: ConvertConfig, some: Sequence[Source], keys: Sequence[str]) -> Template | None:
    """The chat template that is asked for, or the usual one where records are conversations: as --format or the first records say."""
    if config.format == "text":
        if config.chat_template:
            raise UserError("--format text has no chats, and --chat_template is for chats: leave one of them out")
        return None
    usual = "world" if config.tokenizer_type == "RWKVTokenizer" else "chatml"
    first = _first_shape(some, keys) if config.format == "auto" else config.format
    if config.chat_template or config.format != "auto" or set(keys) & set(schemas.MESSAGES):
        return Template(config.chat_template or usual)
    if keys == ["text"]:
        return Template(usual) if first else None
    parts = set(keys) & {name for pair in schemas.PAIRS.values() for name in pair}
    if first and (len(parts) > 1 or parts & {pair[0] for pair in schemas.PAIRS.values()}):
        raise UserError(
            f"--jsonl_keys {config.jsonl_keys} would take questions and answers apart, and the records are conversations ({first}): leave the flag out"
            " to train on the answers, or give --format text too to convert each key as text"
        )
    return None


def _first_shape(some: Sequence[Source], keys: Sequence[str]) -> str:
    """The shape of the first conversation among the first records of the files; empty if there is none."""
    for source in [source for source in some if source.kind not in ("txt", "lines")][:_LOOKED_AT]:
        try:
            shape = next(filter(None, map(_shape, itertools.islice(_records(source, keys), _LOOKED_AT))), "")
        except UserError:  # told with its place when the file is converted
            continue
        if shape and shape != "text":
            return shape
    return ""


def _records(source: Source, keys: Sequence[str]) -> Iterator[Any]:
    for chunk in inputs.chunks([source], [*keys, *schemas.FIELDS]):
        yield from (record for _, record in inputs.records(chunk, inputs.lines_of(chunk), keys))


def _shape(record: Any) -> str:
    """The shape of a record: a conversation's, or text; empty if it cannot be told."""
    try:
        found = schemas.conversation(record) if isinstance(record, dict) else None
    except BadRecord:
        return "chat"  # to be refused with its place
    return found.shape if found else "text" if isinstance(record, dict) and isinstance(record.get("text"), str) else ""
