"""A chunk of records to packed tokens: what one worker does."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv.data import binidx
from rwkv.data.convert import plain_chat, schemas
from rwkv.data.convert.inputs import Chunk, lines_of, records
from rwkv.data.convert.jsonl import BadRecord, text_under
from rwkv.data.convert.messages import Conversation
from rwkv.data.convert.template import Template
from rwkv.data.tokenizer import HFTokenizer, WorldTokenizer
from rwkv.errors import UserError


@dataclass
class Encoded:
    """What became of a chunk.

    Attributes:
        lines: how many lines the chunk has, if it has such.
        tokens, sizes, masks: per key, as binidx.Writer.add_packed takes them.
        rejects: (number in the chunk or source, what is wrong, the record as far as it can be shown).
        counts: what it contained, as rwkv.data.convert.report describes it.
    """

    tokens: list[bytes]
    sizes: list[bytes]
    masks: list[bytes]
    lines: int
    rejects: list[tuple[int, str, str]]
    counts: Counter = field(default_factory=Counter)


@dataclass
class Encoder:
    """Turns chunks into tokens, one key after the other.

    Attributes:
        keys: the fields whose texts make the pairs of files.
        template: with one, records that are conversations become text by it.
        stop: give up a chunk at its first bad record.
        kind: what the records are: one of schemas.FORMATS.
        mask: auto: a mask if there is a template; answers: always, and of plain text only the answers contribute; none: no mask.
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

    @property
    def masked(self) -> bool:
        """Whether every token gets a mask."""
        return self.mask == "answers" or (self.mask == "auto" and self.template is not None)

    def __call__(self, chunk: Chunk) -> Encoded:
        """Tokens of the chunk's documents. Blank texts and empty conversations are skipped and counted, each under its own key.

        Raises:
            UserError: a token id that the dtype does not hold.
        """
        lines = lines_of(chunk)
        packed = [_Packed() for _ in self.keys]
        rejects = []
        counts: Counter = Counter()
        seen: list[tuple] = []  # to be counted: a list is faster than a Counter for each record
        for number, record in records(chunk, lines, self.keys):
            known = len(seen)
            try:
                if isinstance(record, BadRecord):
                    raise record
                for one, segments in zip(packed, [self.segments(record, key, seen) for key in self.keys], strict=True):
                    if segments:
                        self._add(one, segments, counts)
            except BadRecord as error:
                del seen[known:]
                rejects.append((number, str(error), _shown(lines[number] if lines else record)))
                if self.stop:
                    break
        counts.update(seen)
        return Encoded(
            [b"".join(one.tokens) for one in packed],
            [binidx.pack(one.sizes, "int32") for one in packed],
            [b"".join(one.masks) for one in packed],
            len(lines),
            rejects,
            counts,
        )

    def segments(self, record: Any, key: str, seen: list[tuple] | None = None) -> list[tuple[str, bool]]:
        """The text of a document in consecutive segments, each with whether it contributes to the loss; none if there is nothing in it.

        Args:
            seen: gets what the record was, as keys of rwkv.data.convert.report's counts.

        Raises:
            BadRecord: a record that cannot be converted, for whatever reason.
        """
        try:
            return self._segments(record, key, [] if seen is None else seen)
        except (BadRecord, UserError, MemoryError):
            raise
        except Exception as error:
            raise BadRecord(f"cannot be converted ({type(error).__name__}: {error})") from error

    def _segments(self, record: Any, key: str, seen: list[tuple]) -> list[tuple[str, bool]]:
        if self.template and isinstance(record, dict) and (conversation := schemas.conversation(record, self.kind)):
            if why := conversation.skipped:
                seen.append(("skipped", why))
                return []
            found = self.template.segments(self._repaired(conversation))
            if not found:
                seen.append(("skipped", "conversations that the chat template makes no text of"))
                return []
            for message in conversation.messages:
                seen += [("role", message.role), ("name", message.role, message.name[:40])]
            seen.append(("shape", conversation.shape))
            seen += [("remark", remark) for remark in conversation.remarks]
            return found
        try:
            text = text_under(key, record)
        except BadRecord as error:
            if (
                self.template is None
                and self.kind == "auto"
                and key == "text"
                and isinstance(record, dict)
                and schemas.conversation(record)
            ):
                raise BadRecord(
                    f"{error}; it is a conversation among texts: give --chat_template world to convert both"
                ) from error
            raise
        if not text or text.isspace():
            seen.append(("skipped", "blank texts"))
            return []
        if self.ftfy:
            text = _repair(text)
        seen.append(("shape", "text"))
        if self.mask != "answers":
            return [(text, True)]
        if segments := plain_chat.segments(text):
            return segments
        seen.append(("plain", ""))
        return [(text, True)]

    def _repaired(self, conversation: Conversation) -> Conversation:
        if self.ftfy:
            for message in conversation.messages:
                message.content, message.reasoning = _repair(message.content), _repair(message.reasoning)
        return conversation

    def _add(self, packed: "_Packed", segments: list[tuple[str, bool]], counts: Counter) -> None:
        """One document at a time: its ids are gone before the next come, and stay in the processor's cache (a third of the time)."""
        ids: list[int] = []
        trained, masked, world = 0, self.masked, self.tokenizer.name == WorldTokenizer.name
        for text, trains in segments:
            if world and "<|e" in text and (ends := sum(map(text.count, _ENDS))):
                counts["warning", _ENDS_ARE_TEXT] += ends
            some = self.tokenizer.encode(text)
            ids = ids + some if ids else some
            if masked:
                trained += trains * len(some)
                packed.masks.append(bytes([trains]) * len(some))
        if self.append_eod:
            ids.append(self.tokenizer.eod)
        if masked:
            if self.append_eod:
                trained += segments[-1][1]
                packed.masks.append(bytes([segments[-1][1]]))
            counts["trained", ""] += trained
            counts["untrained", ""] += not trained
        try:
            packed.tokens.append(binidx.pack(ids, self.dtype))
        except ValueError as error:
            raise UserError(str(error)) from error
        packed.sizes.append(len(ids))


_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>")  # of other models
_ENDS_ARE_TEXT = (
    "<|endoftext|> and the like in the texts, which World's tokenizer reads as ordinary text and not as the end of a document; split the"
    " documents there, or remove it"
)


@dataclass
class _Packed:
    """The documents of one key so far."""

    tokens: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    masks: list[bytes] = field(default_factory=list)


def _repair(text: str) -> str:
    import ftfy

    return ftfy.fix_text(text)


def _shown(record) -> str:
    if isinstance(record, bytes):
        return record.decode("utf-8", "backslashreplace").rstrip("\r")
    return "" if isinstance(record, BadRecord) else json.dumps(record, ensure_ascii=False, default=str)
