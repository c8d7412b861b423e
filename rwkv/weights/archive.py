"""Strict parser of the zip archives that torch.save writes; archives that zip parsers could
interpret differently are rejected.

Layout (torch/csrc, caffe2/serialize): `NAME/data.pkl`, `NAME/data/K` per storage, `NAME/version`
and a few other small records, uncompressed and aligned to 64 bytes. Archives rewritten with
compression or without alignment are read too.
"""

import os
import re
import struct
import zlib
from typing import BinaryIO, NamedTuple

from rwkv.errors import FileFormatError

MAGIC = b"PK\x03\x04"
_RECORDS = re.compile(
    r"data\.pkl|data/\w+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
_END, _END64, _LOCATOR, _CENTRAL, _LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", MAGIC
_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13  # flags: encrypted, strong encryption, encrypted headers
_SIZES_FOLLOW = 1 << 3  # flag: the local header has no sizes
_STORED, _DEFLATED = 0, 8
# maximum decompressed size of all records: in bytes, or relative to the file's size if that is more
_MAX_INFLATED = 64 << 20
_MAX_RATIO = 50


class Record(NamedTuple):
    """Location of a record in the file: begin and stored size; and its decompressed size and
    CRC-32.
    """

    begin: int
    stored: int
    size: int
    deflated: bool
    crc: int


class NotPlain(FileFormatError):
    """A valid zip archive, but not one written by torch.save. `names`: its records."""

    def __init__(self, message: str, names: list[str]):
        super().__init__(message)
        self.names = names


class Archive:
    """The records of an open zip file, by name without the top folder."""

    def __init__(self, file: BinaryIO):
        """Parse the directory of the archive; the records themselves are not read.

        Raises:
            NotPlain: an archive of something else.
            FileFormatError: truncated, corrupt or ambiguous.
        """
        self._file, self.size = file, os.fstat(file.fileno()).st_size
        self.records = self._parse()

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A record's bytes, decompressed and with the checksum verified.

        Raises:
            FileFormatError: there is no such record, it is larger than `limit`, or its checksum is
                wrong.
        """
        if name not in self.records:
            raise FileFormatError(f"it has no record {name}")
        record = self.records[name]
        if limit is not None and record.size > limit:
            raise FileFormatError(f"its record {name} has {record.size:,} bytes, more than {limit:,}")
        found = self._at(record.begin, record.stored)
        if record.deflated:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                found = inflater.decompress(found, record.size + 1)
            except zlib.error as error:
                raise FileFormatError(f"its record {name} cannot be decompressed ({error})") from error
            if len(found) != record.size or not inflater.eof:
                raise FileFormatError(
                    f"its record {name} does not decompress to the {record.size:,} bytes that the directory states"
                )
        if zlib.crc32(found) != record.crc:
            raise FileFormatError(f"its record {name} has a wrong checksum")
        return found

    def verify(self) -> None:
        """Compare every record with its checksum. Raises FileFormatError."""
        for name, record in self.records.items():
            if record.deflated:
                self.read(name)
                continue
            crc, at, left = 0, record.begin, record.stored
            while left:
                block = self._at(at, min(left, 1 << 22))
                crc, at, left = zlib.crc32(block, crc), at + len(block), left - len(block)
            if crc != record.crc:
                raise FileFormatError(f"its record {name} has a wrong checksum")

    def _at(self, begin: int, size: int) -> bytes:
        if not 0 <= begin <= self.size - size:
            raise FileFormatError("it is truncated, or its directory is corrupt")
        found = os.pread(self._file.fileno(), size, begin)
        while len(found) < size:  # one call reads at most 2 GiB
            more = os.pread(self._file.fileno(), size - len(found), begin + len(found))
            if not more:
                raise FileFormatError("it was truncated while it was read")
            found += more
        return found

    def _directory(self) -> tuple[int, int, int]:
        """Begin, size and number of entries of the central directory."""
        at = self.size - 22
        end = self._at(at, 22)
        if not end.startswith(_END):
            raise FileFormatError(
                "it is truncated, or followed by other bytes: it does not end with the directory of a zip archive"
            )
        disk, first, here, count, size, begin, comment = struct.unpack("<4H2IH", end[4:])
        if disk or first or here != count or comment:
            raise FileFormatError("a zip archive in several parts or with a comment, which torch.save does not write")
        locator = self._at(at - 20, 20) if at >= 20 else b""
        if locator.startswith(_LOCATOR):
            disk, at, disks = struct.unpack("<IQI", locator[4:])
            long = self._at(at, 56) if at == self.size - 22 - 20 - 56 else b""
            if disk or disks != 1 or not long.startswith(_END64) or struct.unpack("<Q", long[4:12]) != (44,):
                raise FileFormatError("its zip64 directory is corrupt")
            disk, first, here64, count64, size64, begin64 = struct.unpack("<2I4Q", long[16:])
            pairs = ((count, count64, 0xFFFF), (size, size64, 0xFFFFFFFF), (begin, begin64, 0xFFFFFFFF))
            if disk or first or here64 != count64 or any(short not in (value, most) for short, value, most in pairs):
                raise FileFormatError("its zip64 directory disagrees with its zip directory")
            count, size, begin = count64, size64, begin64
        if begin + size != at:
            raise FileFormatError("its directory is not where the end of the archive states")
        return begin, size, count

    def _parse(self) -> dict[str, Record]:
        begin, size, count = self._directory()
        if count * 46 > size:
            raise FileFormatError("its directory is corrupt")
        directory, at, found = self._at(begin, size), 0, []
        for _ in range(count):
            fixed = directory[at : at + 46]
            if len(fixed) < 46 or not fixed.startswith(_CENTRAL):
                raise FileFormatError("its directory is corrupt")
            flags, method, crc, stored, full, n, extra, comment, disk, offset = struct.unpack(
                "<4x4x2H4x3I3HH6xI", fixed
            )
            name, more = directory[at + 46 : at + 46 + n], directory[at + 46 + n : at + 46 + n + extra]
            at += 46 + n + extra + comment
            if at > size:
                raise FileFormatError("its directory is corrupt")
            full, stored, offset = _zip64(more, full, stored, offset)
            if disk or flags & _ENCRYPTED:
                raise FileFormatError("an encrypted or split zip archive; unpack it")
            found.append((offset, name, flags, method, crc, stored, full))
        if at != size:
            raise FileFormatError("its directory is corrupt")
        names = _names([name for _, name, *_ in found])
        records: dict[str, Record] = {}
        past, inflated = 0, 0
        for (offset, name, flags, method, crc, stored, full), short in sorted(zip(found, names, strict=True)):
            start = self._start(offset, name, flags, method, stored, full)
            if offset < past or start + stored > begin or (not past and offset):
                raise FileFormatError("its records overlap, or there is data before them")
            if method not in (_STORED, _DEFLATED) or (method == _STORED and stored != full):
                raise FileFormatError(
                    f"its record {short} is compressed in a way, or to a size, that torch.save does not write"
                )
            past = start + stored
            inflated += full if method == _DEFLATED else 0
            records[short] = Record(start, stored, full, method == _DEFLATED, crc)
        if inflated > max(_MAX_INFLATED, _MAX_RATIO * self.size):
            raise FileFormatError(
                f"its compressed records expand to {inflated:,} bytes, too many for a file of {self.size:,} bytes"
            )
        return records

    def _start(self, offset: int, name: bytes, flags: int, method: int, stored: int, full: int) -> int:
        """Begin of a record's bytes; its local header must agree with the directory."""
        header = self._at(offset, 30)
        flags_here, method_here, stored_here, full_here, n, extra = struct.unpack("<4x2x2H8x2I2H", header)
        later = bool(flags_here & _SIZES_FOLLOW)
        sizes_agree = all(
            here in (value, 0xFFFFFFFF) or (later and not here)
            for here, value in ((stored_here, stored), (full_here, full))
        )
        same = (flags_here, method_here, n) == (flags, method, len(name)) and self._at(offset + 30, n) == name
        if not header.startswith(_LOCAL) or not same or not sizes_agree:
            raise FileFormatError("its directory disagrees with its records")
        return offset + 30 + n + extra


def _zip64(extra: bytes, *values: int) -> list[int]:
    """The values of a directory entry; those that exceed 32 bits are read from its zip64 extra
    field.
    """
    wide, at = b"", 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack("<2H", extra[at : at + 4])
        if kind == 1:
            if wide:
                raise FileFormatError("its zip64 directory is corrupt")
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    found = []
    for value in values:
        if value == 0xFFFFFFFF:
            if len(wide) < 8:
                raise FileFormatError("its zip64 directory is corrupt")
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        found.append(value)
    return found


def _names(raw: list[bytes]) -> list[str]:
    """The records' names without their common top folder."""
    names = [name.decode("utf-8", "replace") for name in raw]
    if any(re.search(r"(^|/)(constants\.pkl|code/)", name) for name in names):
        raise NotPlain("a TorchScript program (torch.jit.save), which is code. Use the original state_dict", names)
    tops = {name.partition("/")[0] for name in names}
    short = [name.partition("/")[2] for name in names]
    if "data.pkl" not in short:
        raise NotPlain("a zip archive, but not one that torch.save wrote (it has no data.pkl)", names)
    strange = [name for name, rest in zip(names, short, strict=True) if not _RECORDS.fullmatch(rest)]
    if len(tops) > 1 or strange:
        raise NotPlain(
            f"a zip archive with {(strange or sorted(tops))[0]!r} in it, which torch.save does not write", names
        )
    if len(set(short)) < len(short):
        raise FileFormatError("it has two records with the same name")
    return short
