"""States after prompts and answers, so that a prompt that begins like an earlier text is not read
again from its start.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from rwkv.models import State
from rwkv.models.state import leaves


@dataclass(frozen=True)
class Entry:
    """A state, batch size 1, and the head's input [D] after its last token."""

    state: State
    hidden: Tensor
    bytes: int


class StateCache:
    """States by model and tokens; the least recently used are dropped.

    An entry is found if its tokens are a prefix of the prompt. A state cannot be rewound, so a
    prompt that shares only a part of an entry's tokens finds nothing; `shared` says after how many
    tokens to save a state for the next prompt like it.

    Args:
        max_bytes: bytes that all states together may use.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self._entries: OrderedDict[tuple[str, bytes], Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, model: str, tokens: Sequence[int]) -> tuple[int, Entry | None]:
        """The length of a model's longest entry that is a prefix of these tokens, and that entry;
        (0, None) if there is none.
        """
        whole, best = _packed(tokens), b""
        for name, key in self._entries:
            if name == model and len(key) > len(best) and whole.startswith(key):
                best = key
        if not best:
            return 0, None
        self._entries.move_to_end((model, best))
        return len(best) // _SIZE, self._entries[model, best]

    def shared(self, model: str, tokens: Sequence[int]) -> int:
        """The length of the longest prefix that these tokens share with an entry's."""
        whole, most = _packed(tokens), 0
        for name, key in self._entries:
            if name == model:
                most = _common(whole, key, most)
        return most // _SIZE

    def put(self, model: str, tokens: Sequence[int], state: State, hidden: Tensor) -> None:
        """Add an entry. The tensors must not change afterwards, nor be views of larger ones."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in [*leaves(state), hidden]) + _SIZE * len(tokens)
        if size > self.max_bytes:
            return
        key = model, _packed(tokens)
        if key in self._entries:
            self.bytes -= self._entries.pop(key).bytes
        self._entries[key] = Entry(state, hidden, size)
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1].bytes


_SIZE = 4  # bytes of a token in a key


def _packed(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=np.uint32).tobytes()


def _common(one: bytes, other: bytes, least: int) -> int:
    """The size in bytes of the common prefix, in whole tokens; at least `least`."""
    low, high = least, min(len(one), len(other))
    if high <= low or one[: low + _SIZE] != other[: low + _SIZE]:
        return least
    while low < high:  # one[:low] == other[:low]
        middle = (low + high + _SIZE) // 2 // _SIZE * _SIZE
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - _SIZE
    return low
