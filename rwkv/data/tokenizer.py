"""The World tokenizer: text to ids by greedy longest byte match, and back."""

import ast
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from rwkv import compat

rwkv_tokenizer = compat.rwkv_tokenizer()
EOD = 0  # ends a document; stands for no text
LARGEST_ID = 65529
VOCAB_SIZE = 65536  # the rows that World checkpoints have


class WorldTokenizer:
    """Ids 1 … 65529 of rwkv_vocab_v20230424, the vocabulary of the World models; 0 ends a document."""

    name = "World"
    eod = EOD
    vocab_size = VOCAB_SIZE

    def __init__(self):
        self._library = rwkv_tokenizer.RWKVTokenizer()

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._library.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        return self._library.encode_batch(texts)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids: a token may end inside a character. EOD and the unused ids above 65529 are no bytes.

        The library's own decode panics on both, so this does not call it.

        Raises:
            ValueError: an id that no World model has.
        """
        table = _bytes_of_ids()
        ids = list(ids)
        for i in ids:
            if not 0 <= i < VOCAB_SIZE:
                raise ValueError(f"{i} is not a World token id (0 … {VOCAB_SIZE - 1})")
        return b"".join(table[i] for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


@functools.lru_cache(maxsize=1)
def _bytes_of_ids() -> list[bytes]:
    """Bytes by id, read from the vocabulary that comes with the library: lines of `id literal length`."""
    table = [b""] * VOCAB_SIZE
    vocabulary = Path(rwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
    with open(vocabulary, encoding="utf-8") as lines:
        for line in lines:
            number, literal = line.split(" ", 1)
            literal, length = literal.rsplit(" ", 1)
            token = ast.literal_eval(literal)
            token = token.encode("utf-8") if isinstance(token, str) else token
            if len(token) != int(length):
                raise ValueError(f"{vocabulary}: id {number} is {len(token)} bytes long, and the line says {int(length)}")
            table[int(number)] = token
    return table
