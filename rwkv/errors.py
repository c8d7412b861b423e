"""Errors with messages for users: what is wrong, where, and what to do."""

import re

# Control characters move a terminal's cursor or change its state; bidirectional controls reorder a
# line; surrogates cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Escape control characters (`\\x1b`) in a text from a file, so that printing it cannot affect
    the terminal.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


class UserError(ValueError):
    """Invalid input or flags. Scripts print the message without a traceback and exit with status 1.

    Control characters in the message, which often quotes a file, are escaped.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class FileFormatError(ValueError):
    """A file is corrupt or not of the expected format. The message does not name the file; callers
    add it.
    """
