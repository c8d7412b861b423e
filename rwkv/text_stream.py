"""Generated tokens as text: complete characters, stop texts, and the white space around an
answer.
"""

import codecs
from collections.abc import Sequence

OPENING = {"none": "", "fast": " <think>\n</think", "full": " <think"}
"""How an answer of an RWKV-7 G1 model begins, by --think. As in upstream's templates
(RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt), without the last ">": in text it is part of a longer
token."""

STOP = ("\n\nUser:",)
"""Where a chat answer ends, if not with EOD."""


class TextStream:
    """Decodes tokens to text as soon as it is final: complete characters that do not begin a stop
    text.

    Attributes:
        text: all text so far, without a stop text.
        shown: number of characters of it that were returned.
        stopped: whether a stop text was found; it ends the text.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        # characters withheld because they may begin a stop text
        self.hold = max((len(text) for text in self._stop), default=1) - 1
        self.text, self.shown, self.stopped = "", 0, False

    @property
    def inside_character(self) -> bool:
        """Whether the last token ended inside a character."""
        return bool(self._decoder.getstate()[0])

    def add(self, token: bytes) -> str:
        """Append the bytes of a token; returns the text that has become final."""
        self.text += self._decoder.decode(token)
        found = [at for word in self._stop if (at := self.text.find(word, max(0, self.shown - self.hold))) >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
        return self._release(0 if self.stopped else self.hold)

    def end(self) -> str:
        """The rest of the text; an incomplete character becomes U+FFFD."""
        if not self.stopped:
            self.text += self._decoder.decode(b"", final=True)
        return self._release(0)

    def _release(self, hold: int) -> str:
        end = max(self.shown, len(self.text) - hold)
        text, self.shown = self.text[self.shown : end], end
        return text


class Answer:
    """The text of a chat answer, without surrounding white space, from parts as they are generated.

    Args:
        think: as OPENING: with "full" the text begins with the thoughts; with "fast" the rest of
            the empty thought is removed.

    Attributes:
        text: what was returned so far.
    """

    def __init__(self, think: str = "none"):
        self.text, self._held = "", ""
        self._begin = OPENING["full"].lstrip() if think == "full" else ""
        self._closing = ">" if think == "fast" else ""

    def begin(self) -> str:
        """The text before the first part; "" for most."""
        self.text = self._begin
        return self.text

    def add(self, part: str) -> str:
        """Append a part; returns the text to show. White space is withheld until text follows."""
        if self.text:
            part = self._held + part
        elif part := part.lstrip():
            part, self._closing = part.removeprefix(self._closing).lstrip(), ""
        shown = part.rstrip()
        self._held = part[len(shown) :]
        self.text += shown
        return shown
