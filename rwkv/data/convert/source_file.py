"""An input file: its format, compression and encoding, and a stream of its bytes as UTF-8."""

import codecs
import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from rwkv.data.convert.jsonl import BadRecord
from rwkv.errors import UserError

CHUNK = 1 << 20  # bytes of text per task of a worker
DECODE_BLOCK = 1 << 18  # bytes decoded at a time
BOM = b"\xef\xbb\xbf"
TEXT = {"jsonl", "json", "lines", "txt", "csv"}  # formats that are text in some encoding
MAX_RECORD = 1 << 30


@dataclass(frozen=True)
class Source:
    """A file to convert.

    Attributes:
        path: path as given by the user, for messages.
        kind: format: jsonl, json, lines (each line a document), txt (one document), csv, parquet,
            arrow.
        compression: gzip, zstd or "".
        size: bytes on disk.
        delimiter: of csv.
        encoding: of text; "" is UTF-8.
        keep_crlf: keep CRLF line endings in txt.
        max_record: maximum size of a record in bytes.
        identity: device, inode, size and mtime (ns) when the file was found; None: changes are not
            detected.
        spool: path of the temporary file with the contents, if `path` is a pipe.
    """

    path: Path
    kind: str
    compression: str
    size: int
    delimiter: str = ","
    encoding: str = ""
    keep_crlf: bool = False
    max_record: int = MAX_RECORD
    identity: tuple[int, int, int, int] | None = None
    spool: str = ""

    @property
    def mtime_ns(self) -> int:
        """Modification time in ns since 1970; 0 if unknown."""
        return self.identity[3] if self.identity else 0

    @property
    def stored(self) -> str | Path:
        """Path to read the bytes from."""
        return self.spool or self.path

    @property
    def plain(self) -> bool:
        """Whether the stored bytes are UTF-8, so that a range of the file can be read alone."""
        return not self.compression and not self.encoding

    @property
    def too_large(self) -> BadRecord:
        """The error for a record over max_record."""
        size = f"{self.max_record >> 20:,} MiB" if self.max_record >> 20 else f"{self.max_record:,} bytes"
        return BadRecord(
            f"a record larger than {size}; if this is intended and it fits into memory, raise --max_record_mb"
        )

    def reject_size(self, where: str) -> NoReturn:
        """Raise UserError for a record over max_record."""
        raise UserError(f"{self.path}, {where}: {self.too_large}")


@contextlib.contextmanager
def open_source(source: Source) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Open a source: (its decompressed bytes, as UTF-8 if it is text; bytes of the file read so
    far).

    Raises:
        UserError: the compressed data is corrupt or truncated.
    """
    with open(source.stored, "rb") as raw:
        file: Any = raw
        if source.compression:
            import pyarrow  # takes 0.2 s to import, and plain jsonl does not need it

            # not Python's zstandard, which accepts truncated files
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), source.compression)
            file = io.BufferedReader(stream, 1 << 18)
        if source.encoding:
            file = io.BufferedReader(Utf8Stream(file, source.encoding), 1 << 18)
        try:
            yield file, raw.tell
        except OSError as error:
            if error.errno:
                raise
            # raised by pyarrow
            raise UserError(f"{source.path}: corrupt or truncated ({error}); copy or download it again") from error


def read_line(source: Source, file: BinaryIO, where: str) -> bytes:
    """The next line of a file. Raises UserError if it is longer than max_record."""
    line = file.readline(source.max_record + 1)
    return source.reject_size(where) if len(line) > source.max_record else line


class Utf8Stream(io.RawIOBase):
    """A file in another encoding as a stream of UTF-8.

    Bytes that are not valid in the encoding become invalid UTF-8, so that only the record that
    contains them is rejected.
    """

    def __init__(self, file: BinaryIO, encoding: str):
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("rwkv.mark")
        self._left, self._ended = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left and not self._ended:
            block = self._file.read(DECODE_BLOCK)
            self._ended = not block
            self._left = self._decoder.decode(block, final=self._ended).encode("utf-8", "surrogatepass")
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _mark_invalid(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("rwkv.mark", _mark_invalid)
