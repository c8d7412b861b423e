"""Encode a chunk of records to packed tokens: the work of one worker process."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv.data import binidx_writer
from rwkv.data.convert import plain_chat, preference, roles, schemas
from rwkv.data.convert.inputs import Chunk, lines_of, records
from rwkv.data.convert.jsonl import BadRecord, text_of
from rwkv.data.convert.messages import Conversation
from rwkv.data.convert.template import Template
from rwkv.data.tokenizer import HFTokenizer, WorldTokenizer
from rwkv.errors import UserError


@dataclass
class Encoded:
    """The encoded documents of a chunk.

    Attributes:
        tokens, sizes, masks: arguments of binidx_writer.Writer.add_packed, per key.
        lines: number of lines in the chunk; 0 if it does not consist of lines.
        rejects: (number in the chunk or source, reason, the record as text) of bad records.
        counts: statistics, see rwkv.data.convert.report.
        values: the values of the field `by` of the documents.
    """

    tokens: list[bytes]
    sizes: list[bytes]
    masks: list[bytes]
    lines: int
    rejects: list[tuple[int, str, str]]
    counts: Counter = field(default_factory=Counter)
    values: list[str] = field(default_factory=list)


@dataclass
class Encoder:
    """Encodes chunks to tokens, for each key separately.

    Attributes:
        keys: the fields whose texts are converted, each into its own pair of files.
        template: renders records that are conversations; None: convert text only.
        stop: stop at the first bad record of a chunk.
        kind: schema of the records, one of schemas.FORMATS. With preference, every record becomes
            two documents, with the chosen and with the rejected answer.
        mask: "auto": write a mask if there is a template; "answers": always, and train only on the
            answers of plain text too; "none": no mask.
        by: a field whose values are returned, for the documents of the first key; "": none.
    """

    tokenizer: WorldTokenizer | HFTokenizer
    keys: Sequence[str]
    dtype: str
    append_eod: bool = True
    ftfy: bool = False
    template: Template | None = None
    stop: bool = True
    kind: str = "auto"
    mask: str = "auto"
    by: str = ""

    @property
    def masked(self) -> bool:
        """Whether a loss mask is written."""
        return self.mask == "answers" or (self.mask == "auto" and self.template is not None)

    @property
    def paired(self) -> bool:
        """Whether documents are pairs of a chosen and a rejected answer."""
        return self.kind == schemas.PREFERENCE

    def __call__(self, chunk: Chunk) -> Encoded:
        """Encode the chunk's documents. Blank texts and empty conversations are skipped and counted
        by reason.

        Raises:
            UserError: a token id does not fit the dtype.
        """
        lines = lines_of(chunk)
        packed = [_PackedDocuments() for _ in self.keys]
        rejects = []
        values: list[str] = []
        counts: Counter = Counter()
        seen: list[tuple] = []  # counted at the end: faster than updating a Counter per record
        for number, record in records(chunk, lines, self.keys):
            known = len(seen)
            try:
                if isinstance(record, BadRecord):
                    raise record
                documents = [self.documents(record, key, seen) for key in self.keys]
                if self.by and documents[0]:
                    values += [_value(record, self.by)] * len(documents[0])
                for column, texts in zip(packed, documents, strict=True):
                    for segments in texts:
                        self._add(column, segments, counts)
            except BadRecord as error:
                del seen[known:]
                rejects.append((number, str(error), _as_text(lines[number] if lines else record)))
                if self.stop:
                    break
        counts.update(seen)
        return Encoded(
            [b"".join(column.tokens) for column in packed],
            [binidx_writer.pack(column.sizes, "int32") for column in packed],
            [b"".join(column.masks) for column in packed],
            len(lines),
            rejects,
            counts,
            values,
        )

    def documents(self, record: Any, key: str, seen: list[tuple] | None = None) -> list[list[tuple[str, bool]]]:
        """The texts of a record's documents, each as consecutive (text, contributes to the loss)
        segments; none if the record is skipped.

        Args:
            seen: keys of rwkv.data.convert.report's counts are appended to it.

        Raises:
            BadRecord: the record cannot be converted.
        """
        try:
            found = [] if seen is None else seen
            if self.paired:
                return self._pair(record, found)
            segments = self._segments(record, key, found)
            return [segments] if segments else []
        except (BadRecord, UserError, MemoryError):
            raise
        except Exception as error:
            raise BadRecord(f"cannot be converted ({type(error).__name__}: {error})") from error

    def _pair(self, record: Any, seen: list[tuple]) -> list[list[tuple[str, bool]]]:
        if not isinstance(record, dict):
            raise BadRecord(f"a {type(record).__name__}, not an object with a chosen and a rejected answer")
        assert self.template  # there is one for every conversation
        pair = preference.conversations(record)
        for conversation in pair:
            if why := conversation.skipped:
                seen.append(("skipped", why))
                return []
        chosen, rejected = (self.template.segments(self._fix_conversation(conversation)) for conversation in pair)
        if "".join(text for text, _ in chosen) == "".join(text for text, _ in rejected):
            seen.append(("skipped", "pairs whose answers are identical"))
            return []
        for segments, key in ((chosen, "chosen"), (rejected, "rejected")):
            if not any(trains and text for text, trains in segments):
                raise BadRecord(f'the chat template marks nothing of "{key}" as an answer')
        for conversation in pair:
            self._count(conversation, seen)
        return [chosen, rejected]

    def _count(self, conversation: Conversation, seen: list[tuple]) -> None:
        for message in conversation.messages:
            seen += [("role", message.role), ("name", message.role, message.name[:40])]
            seen += [("unused", "messages", key[:40]) for key in message.unused]
        seen.append(("schema", conversation.schema))
        seen += [("remark", remark) for remark in conversation.remarks]
        seen += [("unused", "records", key[:40]) for key in conversation.unused]

    def _segments(self, record: Any, key: str, seen: list[tuple]) -> list[tuple[str, bool]]:
        if self.template and isinstance(record, dict) and (conversation := schemas.conversation(record, self.kind)):
            if why := conversation.skipped:
                seen.append(("skipped", why))
                return []
            found = self.template.segments(self._fix_conversation(conversation))
            if not found:
                seen.append(("skipped", "conversations that the chat template renders to nothing"))
                return []
            self._count(conversation, seen)
            return found
        if self.template and isinstance(record, dict) and record and all(value is None for value in record.values()):
            seen.append(("skipped", "records without a value"))
            return []
        try:
            text = text_of(key, record)
        except BadRecord as error:
            if (
                self.template is None
                and self.kind == "auto"
                and key == "text"
                and isinstance(record, dict)
                and schemas.conversation(record)
            ):
                raise BadRecord(
                    f"{error}; the record is a conversation, but others are texts: pass --chat_template world to convert both"
                ) from error
            raise
        if roles.blank(text):
            seen.append(("skipped", "blank texts"))
            return []
        if self.ftfy:
            text = _fix_unicode(text)
        seen.append(("schema", "text"))
        if self.mask != "answers":
            return [(text, True)]
        if segments := plain_chat.segments(text):
            return segments
        seen.append(("plain", ""))
        return [(text, True)]

    def _fix_conversation(self, conversation: Conversation) -> Conversation:
        if self.ftfy:
            for message in conversation.messages:
                message.content, message.reasoning = _fix_unicode(message.content), _fix_unicode(message.reasoning)
        return conversation

    def _add(self, packed: "_PackedDocuments", segments: list[tuple[str, bool]], counts: Counter) -> None:
        """Encode and pack one document. Packing each immediately keeps its ids in cache, which is
        three times as fast.
        """
        ids: list[int] = []
        trained, masked, world = 0, self.masked, self.tokenizer.name == WorldTokenizer.name
        for text, trains in segments:
            if world and "<|e" in text and (ends := sum(map(text.count, _ENDS))):
                counts["warning", _ENDS_ARE_TEXT] += ends
            new_ids = self.tokenizer.encode(text)
            ids = ids + new_ids if ids else new_ids
            if masked:
                trained += trains * len(new_ids)
                packed.masks.append(bytes([trains]) * len(new_ids))
        if self.append_eod:
            ids.append(self.tokenizer.eod)
        if masked:
            if self.append_eod:
                trained += segments[-1][1]
                packed.masks.append(bytes([segments[-1][1]]))
            counts["trained", ""] += trained
            counts["untrained", ""] += not trained
        try:
            packed.tokens.append(binidx_writer.pack(ids, self.dtype))
        except ValueError as error:
            raise UserError(str(error)) from error
        packed.sizes.append(len(ids))


_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>")  # of other models
_ENDS_ARE_TEXT = (
    "<|endoftext|> or similar in the texts, which World's tokenizer encodes as ordinary text, not as the end of a document; split the"
    " documents there, or remove it"
)


@dataclass
class _PackedDocuments:
    """The encoded documents of one key."""

    tokens: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    masks: list[bytes] = field(default_factory=list)


def _value(record: Any, name: str) -> str:
    """A field of a record as text. Raises BadRecord if there is none."""
    if not isinstance(record, dict) or name not in record:
        raise BadRecord(f"has no field {name}; name another with --by")
    value = record[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _fix_unicode(text: str) -> str:
    import ftfy

    return ftfy.fix_text(text)


def _as_text(record) -> str:
    if isinstance(record, bytes):
        return record.decode("utf-8", "backslashreplace").rstrip("\r")
    return "" if isinstance(record, BadRecord) else json.dumps(record, ensure_ascii=False, default=str)
