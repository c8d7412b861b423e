"""A file in another encoding, read as UTF-8."""

import codecs
import io
from typing import BinaryIO

BLOCK = 1 << 18  # bytes that are decoded together


class Transcoded(io.RawIOBase):
    """A file in another encoding as a stream of UTF-8. What is not valid in the encoding becomes a byte sequence that is not valid UTF-8, so
    that the record with it is found to be bad, and no other."""

    def __init__(self, file: BinaryIO, encoding: str):
        self._file, self._decoder, self._left, self._ended = (
            file,
            codecs.getincrementaldecoder(encoding)("rwkv.mark"),
            b"",
            False,
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left and not self._ended:
            block = self._file.read(BLOCK)
            self._ended = not block
            self._left = self._decoder.decode(block, final=self._ended).encode("utf-8", "surrogatepass")
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _mark(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("rwkv.mark", _mark)
