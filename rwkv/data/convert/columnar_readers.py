"""Read parquet and arrow files into batches of records, in order and in bounded memory."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from rwkv.data.convert.batches import Row, batches, select_columns
from rwkv.data.convert.jsonl import BadRecord
from rwkv.data.convert.source_file import Source
from rwkv.errors import UserError

_BATCH = 1 << 26  # maximum bytes of a batch of parquet rows
_DICTIONARY_PAGE = 2  # Thrift's PageType of a dictionary
_EXPANDED = 1 << 26  # bytes of rows to convert to Python objects at a time


def _parquet(
    source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]
) -> Iterator[tuple[dict, int]]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as spool:
        if source.compression:  # parquet is read from its end
            shutil.copyfileobj(file, spool, 1 << 20)
            file = spool
        try:
            table = parquet.ParquetFile(file)
            columns = select_columns(source, table.schema_arrow.names, fields)
            omitted = [name for name in table.schema_arrow.names if name not in columns]
            size, kept = _batch(table, file, columns)
            if kept:
                table = parquet.ParquetFile(file, read_dictionary=kept)
            count, number = table.num_row_groups, 0
            for group in range(count):
                at, end = (source.size * i // count for i in (group, group + 1))
                if begins[0] <= at < begins[1]:
                    row_batches = table.iter_batches(size, row_groups=[group], columns=columns)
                    for rows, share in _shares(batches(source, _rows(row_batches, number, omitted)), end - at):
                        yield {"rows": rows}, share
                number += table.metadata.row_group(group).num_rows
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{source.path}: not parquet, or corrupt ({error}); copy or export it again") from error


def _batch(table: Any, file: BinaryIO, columns: Sequence[str]) -> tuple[int, list[str]]:
    """Rows per batch (at most 256), and the columns to keep dictionary-encoded, so that a batch has
    bounded size.

    A text stored once in a dictionary may occur in every row, and many times in a row of lists.
    """
    rows, kept = 256, set()
    for group in range(table.num_row_groups):
        metadata = table.metadata.row_group(group)
        for column in map(metadata.column, range(metadata.num_columns)):
            if (
                column.physical_type == "BYTE_ARRAY"
                and column.path_in_schema.split(".")[0] in columns
                and metadata.num_rows
            ):
                row_bytes = _longest(file, column) * max(1, column.num_values // metadata.num_rows)
                if row_bytes > _BATCH:
                    kept.add(column.path_in_schema)
                else:
                    rows = min(rows, max(1, _BATCH // max(1, row_bytes)))
    return rows, sorted(kept)


def _longest(file: BinaryIO, column: Any) -> int:
    """Upper bound in bytes of a value that a parquet column stores once for many rows: the size of
    its dictionary page.
    """
    if any(encoding.startswith("DELTA_BYTE_ARRAY") for encoding in column.encodings):
        return column.total_uncompressed_size
    file.seek(column.dictionary_page_offset or column.data_page_offset)
    head, at, fields = file.read(32), 0, []
    # type and size, the first fields of the header, in Thrift's compact protocol
    for _ in range(2):
        if head[at : at + 1] != b"\x15":
            return column.total_uncompressed_size
        at, number, shift = at + 1, 0, 0
        while at < len(head):
            number, shift, at = number | (head[at] & 127) << shift, shift + 7, at + 1
            if head[at - 1] < 128:
                break
        fields.append(number >> 1)
    return fields[1] if fields[0] == _DICTIONARY_PAGE else 0


def _arrow(
    source: Source, file: BinaryIO, fields: Sequence[str], begins: tuple[int, int]
) -> Iterator[tuple[dict, int | None]]:
    import pyarrow

    with contextlib.ExitStack() as stack:
        try:
            # Not memory-mapped: a file truncated meanwhile would kill the process with SIGBUS.
            stream = file if source.compression else stack.enter_context(pyarrow.OSFile(str(source.stored)))
            reader = stack.enter_context(pyarrow.ipc.open_stream(stream))
            columns, number, before = select_columns(source, reader.schema.names, fields), 0, 0
            omitted = [name for name in reader.schema.names if name not in columns]
            while True:
                at = 0 if source.compression else before
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    break
                before = 0 if source.compression else stream.tell()
                if begins[0] <= at < begins[1]:
                    batch = batch.select(columns)
                    batch.validate(full=True)  # otherwise invalid offsets would read outside the buffers
                    for rows, share in _shares(batches(source, _rows([batch], number, omitted)), before - at):
                        yield {"rows": rows}, None if source.compression else share
                number += batch.num_rows
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise UserError(
                f"{source.path}: not an Arrow stream (as written by save_to_disk), or corrupt ({error}); copy or export it again"
            ) from error


def _rows(batches: Iterable, number: int, omitted: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Numbered rows, converted a few at a time, because all of them may share one dictionary value.
    Unreadable rows are BadRecords.
    """
    for batch in batches:
        step = max(1, min(256, _EXPANDED // max(1, batch.nbytes)))
        for first in range(0, batch.num_rows, step):
            part = batch.slice(first, step)
            try:
                rows = part.to_pylist()
            except Exception:  # such as a time out of range, or bytes that are not UTF-8
                rows = [_row(part.slice(i, 1)) for i in range(part.num_rows)]
            for row in rows:
                number += 1
                yield number, row if isinstance(row, BadRecord) else Row(row, omitted)


def _row(part: Any) -> Any:
    try:
        return part.to_pylist()[0]
    except Exception as error:
        return BadRecord(f"cannot be read ({type(error).__name__}: {error})")


def _shares(parts: Iterator, size: int) -> Iterator[tuple[Any, int]]:
    """Each part with its bytes for the progress bar: all with the first part, as the number of
    parts is unknown.
    """
    for part in parts:
        yield part, size
        size = 0


READERS = {"parquet": _parquet, "arrow": _arrow}
