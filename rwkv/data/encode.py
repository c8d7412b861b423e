"""A chunk of records to packed tokens: what one worker does."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv.data import binidx, chat
from rwkv.data.inputs import Chunk, lines_of, records
from rwkv.data.jsonl import BadRecord, text_under
from rwkv.data.tokenizer import HFTokenizer, WorldTokenizer
from rwkv.errors import UserError


@dataclass
class Encoded:
    """What became of a chunk.

    Attributes:
        lines: how many lines the chunk has, if it has such.
        tokens, sizes, masks: per key, as binidx.Writer.add_packed takes them.
        rejects: (number in the chunk or source, what is wrong, the record as far as it can be shown).
    """

    tokens: list[bytes]
    sizes: list[bytes]
    masks: list[bytes]
    lines: int
    rejects: list[tuple[int, str, str]]


@dataclass
class Encoder:
    """Turns chunks into tokens, one key after the other.

    Attributes:
        keys: the fields whose texts make the pairs of files.
        template: with one, `messages` and `conversations` records become text by it, and every token gets a mask.
        stop: give up a chunk at its first bad record.
    """

    tokenizer: WorldTokenizer | HFTokenizer
    keys: Sequence[str]
    dtype: str
    append_eod: bool = True
    ftfy: bool = False
    template: chat.Template | None = None
    stop: bool = True

    def __call__(self, chunk: Chunk) -> Encoded:
        """Tokens of the chunk's documents. Empty texts are passed over, each under its own key.

        Raises:
            UserError: a token id that the dtype does not hold.
        """
        lines = lines_of(chunk)
        packed = [_Packed() for _ in self.keys]
        rejects = []
        for number, record in records(chunk, lines, self.keys):
            try:
                if isinstance(record, BadRecord):
                    raise record
                for one, segments in zip(packed, [self.segments(record, key) for key in self.keys], strict=True):
                    if segments:
                        self._add(one, segments)
            except BadRecord as error:
                rejects.append((number, str(error), _shown(lines[number] if lines else record)))
                if self.stop:
                    break
        return Encoded(
            [b"".join(one.tokens) for one in packed],
            [binidx.pack(one.sizes, "int32") for one in packed],
            [b"".join(one.masks) for one in packed],
            len(lines),
            rejects,
        )

    def segments(self, record: Any, key: str) -> list[tuple[str, bool]]:
        """The text of a document in pieces with their mask: one piece, unless it is a chat; none if it is empty. Raises BadRecord."""
        if self.template and isinstance(record, dict) and (messages := chat.messages_of(record)):
            segments = self.template.segments(messages)
        else:
            text = text_under(key, record)
            segments = [(text, True)] if text else []
        if self.ftfy:
            import ftfy

            segments = [(ftfy.fix_text(text), counts) for text, counts in segments]
        return segments

    def _add(self, packed: "_Packed", segments: list[tuple[str, bool]]) -> None:
        """One document at a time: its ids are gone before the next come, and stay in the processor's cache (a third of the time)."""
        ids: list[int] = []
        for text, counts in segments:
            some = self.tokenizer.encode(text)
            ids = ids + some if ids else some
            if self.template:
                packed.masks.append(bytes([counts]) * len(some))
        if self.append_eod:
            ids.append(self.tokenizer.eod)
            if self.template:
                packed.masks.append(bytes([segments[-1][1]]))
        try:
            packed.tokens.append(binidx.pack(ids, self.dtype))
        except ValueError as error:
            raise UserError(str(error)) from error
        packed.sizes.append(len(ids))


@dataclass
class _Packed:
    """The documents of one key so far."""

    tokens: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    masks: list[bytes] = field(default_factory=list)


def _shown(record) -> str:
    if isinstance(record, bytes):
        return record.decode("utf-8", "backslashreplace").rstrip("\r")
    return "" if isinstance(record, BadRecord) else json.dumps(record, ensure_ascii=False, default=str)
