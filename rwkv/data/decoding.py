"""Show the tokens of a dataset as text: its vocabulary, and examples of samples as the model sees
them.
"""

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rwkv.data import provenance
from rwkv.data.binidx import Dataset
from rwkv.data.dataset import Samples
from rwkv.data.tokenizer import VOCAB_SIZE, HFTokenizer, WorldTokenizer
from rwkv.errors import UserError


class Vocabulary(Protocol):
    """Converts between ids and text. `eod` is the id that ends documents."""

    name: str
    eod: int

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""


class Characters:
    """The vocabulary of character-level data, {id: character} in a JSON file.

    Raises:
        UserError: the file cannot be read.
    """

    name, eod = "characters", -1

    def __init__(self, path: Path):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self._letters = {int(number): str(letter) for number, letter in found.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: not a vocabulary of characters ({error}); use the vocab.json of the run that trained the model"
            ) from error
        self._ids = {letter: number for number, letter in self._letters.items()}

    def decode(self, ids: Sequence[int]) -> str:
        """The characters of the ids; "?" for others."""
        return "".join(self._letters.get(i, "?") for i in ids)

    def encode(self, text: str) -> list[int]:
        """The ids of the known characters of a text."""
        return [self._ids[letter] for letter in text if letter in self._ids]


class Numbers:
    """Ids as numbers, if the vocabulary is unknown."""

    name, eod = "unknown", 0

    def decode(self, ids: Sequence[int]) -> str:
        """The ids, separated by spaces."""
        return " ".join(map(str, ids))

    def encode(self, text: str) -> list[int]:
        """Raises UserError: texts cannot be encoded."""
        raise UserError("the tokenizer of the data is unknown, so text cannot be encoded; omit --sample_ask")


def vocabulary_of(data: Dataset, vocab_size: int, characters: Path | None = None) -> Vocabulary:
    """The vocabulary of a dataset: from its manifest, else World if the model has its size.

    Args:
        vocab_size: of the model.
        characters: the vocabulary file of character-level data.
    """
    if characters is not None and characters.is_file():
        return Characters(characters)
    if path := provenance.tokenizer_file(data):
        return HFTokenizer(path)
    tokenizer = (provenance.read(data.prefix) or {}).get("tokenizer")
    if vocab_size == VOCAB_SIZE and (tokenizer is None or tokenizer["name"] == WorldTokenizer.name):
        return WorldTokenizer(encodes=False)
    return Numbers()


def pieces(ids: Sequence[int], vocabulary: Vocabulary) -> list[tuple[str, list[int]]]:
    """Split ids into the smallest groups that are whole characters: (text, ids) of each."""
    found: list[tuple[str, list[int]]] = []
    if isinstance(vocabulary, WorldTokenizer):
        decoder, group = codecs.getincrementaldecoder("utf-8")("replace"), list[int]()
        for i in ids:
            text = decoder.decode(vocabulary.decode_bytes([i]))
            group.append(i)
            if not decoder.getstate()[0]:
                found.append((text, group))
                group = []
            elif text:  # an invalid beginning, replaced, before another incomplete character
                found.append((text, group[:-1]))
                group = group[-1:]
        return [*found, *([(decoder.decode(b"", final=True), group)] if group else [])]
    group = []
    for i in ids:
        group.append(i)
        text = vocabulary.decode(group)
        if not text.endswith("�") or len(group) == 4:  # no character has more bytes
            found.append((f"{text} " if isinstance(vocabulary, Numbers) else text, group))
            group = []
    return [*found, *([(vocabulary.decode(group), group)] if group else [])]


@dataclass(frozen=True)
class Example:
    """A sample as the model sees it.

    Attributes:
        pieces: (text, whether it contributes to the loss) of the first tokens; "" is the end of a
            document.
        tokens: number of tokens of the sample, without padding.
        counted: number of tokens that contribute to the loss.
        padding: number of padding tokens.
        shown: number of tokens in `pieces`.
    """

    pieces: list[tuple[str, bool]]
    tokens: int
    counted: int
    padding: int
    shown: int


def example(samples: Samples, window: tuple[int, int], vocabulary: Vocabulary, limit: int) -> Example:
    """The sample with the tokens `window` = [begin, end) of the stream, of which at most `limit`
    are shown.
    """
    x, y, *rest = samples.sequence(*window)
    length = window[1] - window[0]
    ids = [int(x[0]), *y.tolist()][:length]
    # the first token has nothing before it to be predicted from
    loss_mask = [False, *(rest[0].tolist() if rest else [True] * len(y))][:length]
    shown, done = [], 0
    for text, group in pieces(ids[:limit], vocabulary):
        shown.append(("" if group == [vocabulary.eod] else text, bool(loss_mask[done])))
        done += len(group)
    return Example(shown, length, sum(loss_mask), len(y) + 1 - length, done)
