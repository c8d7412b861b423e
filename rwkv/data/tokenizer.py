"""Tokenizers: World (greedy longest byte match), and any tokenizer.json, such as that of the 20B
models.
"""

import ast
import functools
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path

from rwkv import compat
from rwkv.errors import UserError

rwkv_tokenizer = compat.rwkv_tokenizer()
EOD = 0  # end of document; decodes to the empty string
LARGEST_ID = 65529  # of the World vocabulary
VOCAB_SIZE = 65536  # vocabulary size of World checkpoints


class WorldTokenizer:
    """The World models' vocabulary, rwkv_vocab_v20230424: ids 1 … 65529; 0 is EOD.

    Args:
        encodes: load the library now, which takes 240 MB; else when a text is encoded.
    """

    name = "World"
    eod = EOD
    vocab_size = VOCAB_SIZE

    def __init__(self, encodes: bool = True):
        if encodes:  # before worker processes are forked, which then share it
            _world()

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return _world().encode(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, which may end inside a character. EOD and the unused ids above
        65529 decode to nothing.

        The library's own decode panics on both, so this does not call it.

        Raises:
            ValueError: an id outside the vocabulary.
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

    def as_decoded(self, text: str) -> str:
        """The text that the ids of `text` decode to: `text` itself."""
        return text


class HFTokenizer:
    """A tokenizer.json of the `tokenizers` library; for the 20B models 20B_tokenizer.json of
    GPT-NeoX.

    Raises:
        UserError: no such file, not a tokenizer, or it has no end-of-document token.
    """

    _ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")

    def __init__(self, path: str | Path):
        import tokenizers

        if not str(path):
            raise UserError("--vocab_file is missing: --tokenizer_type HFTokenizer needs a tokenizer.json")
        if not Path(path).is_file():
            raise UserError(
                f"{path}: no such file. --tokenizer_type HFTokenizer needs a tokenizer.json as --vocab_file"
            )
        try:
            self._library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no specific exception
            raise UserError(
                f"{path}: not a tokenizer.json ({error}); pass the file of that name of a Hugging Face model"
            ) from error
        self._library.no_padding()
        self._library.no_truncation()
        ends = [number for name in self._ENDS if (number := self._library.token_to_id(name)) is not None]
        if not ends:
            raise UserError(
                f"{path}: has no end-of-document token ({', '.join(self._ENDS)}); add one of them to the tokenizer"
            )
        self.name, self.eod, self.vocab_size = Path(path).name, ends[0], self._library.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the special tokens that the file may add at its beginning and
        end.
        """
        return self._library.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of the ids in UTF-8, without a final EOD."""
        ids = list(ids)
        return self.decode(ids[:-1] if ids and ids[-1] == self.eod else ids).encode("utf-8")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def as_decoded(self, text: str) -> str:
        """The text that the ids of `text` decode to: `text` in the tokenizer's normal form (NFC for
        20B).
        """
        return self._library.normalizer.normalize_str(text) if self._library.normalizer else text


def world_vocabulary() -> list[bytes]:
    """The bytes of the World vocabulary's tokens, by id; empty for EOD and the unused ids above
    65529.
    """
    return list(_bytes_of_ids())


def same_vocabulary(path: str | Path) -> bool:
    """Whether a vocabulary file is the World models'; line endings may differ."""
    ours, theirs = (Path(file).read_bytes().replace(b"\r\n", b"\n").rstrip() for file in (_vocabulary(), path))
    return ours == theirs


@functools.lru_cache(maxsize=1)
def _world():
    return rwkv_tokenizer.RWKVTokenizer()


def _vocabulary() -> Path:
    return Path(inspect.getfile(rwkv_tokenizer)).with_name("rwkv_vocab_v20230424.txt")


@functools.lru_cache(maxsize=1)
def _bytes_of_ids() -> list[bytes]:
    """Bytes by id, from the library's vocabulary file: lines of `id literal length`."""
    table = [b""] * VOCAB_SIZE
    vocabulary = _vocabulary()
    with open(vocabulary, encoding="utf-8") as lines:
        for line in lines:
            number, literal = line.split(" ", 1)
            literal, length = literal.rsplit(" ", 1)
            simple = literal[0] in "'\"" and literal[0] == literal[-1] and "\\" not in literal
            token = literal[1:-1] if simple else ast.literal_eval(literal)
            token = token.encode("utf-8") if isinstance(token, str) else token
            if len(token) != int(length):
                raise ValueError(f"{vocabulary}: id {number} has {len(token)} bytes, but the line says {int(length)}")
            table[int(number)] = token
    return table
