"""Readers bound memory, withstand malicious files, and reject single bad records."""

import csv
import gzip
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from rwkv.config import ConvertConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert import char_level, source_file
from rwkv.data.convert.pipeline import convert
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError

LONG = "a" * 1_500_000


def converted(source, prefix, **flags):
    result = convert(
        ConvertConfig(**{"input": str(source), "output_prefix": str(prefix), "workers": 1, "force": True, **flags})
    )
    data = Dataset(result.pairs[0][0])
    return [WorldTokenizer().decode(data.document(i)[:-1]) for i in range(len(data))], result


def arrow_bytes(table):
    out = io.BytesIO()
    with pyarrow.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    return out.getvalue()


def parquet_bytes(table, **flags):
    out = io.BytesIO()
    parquet.write_table(table, out, **flags)
    return out.getvalue()


def zstd(data):
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


JSONL = b'{"text": "first"}\n{"text": "%s"}\n' % LONG.encode()
TABLE = pyarrow.table({"text": ["first", LONG]})
TOO_LARGE = {
    "x.jsonl": (JSONL, r"line 2"),
    "nolines.jsonl": (b"x" * 3_000_000, r"byte"),
    "x.jsonl.gz": (gzip.compress(JSONL), r"line 2"),
    "x.jsonl.zst": (zstd(JSONL), r"line 2"),
    "x.json": (json.dumps([{"text": "first"}, {"text": LONG}]).encode(), r"element 2"),
    "x.csv": (f"text\nfirst\n{LONG}\n".encode(), r"line 3"),
    "quoted.csv": (b'text\nfirst\n"' + (b"a" * 99 + b"\n") * 16_000 + b'"\n', r"line 3"),
    "x.txt": (LONG.encode(), r"the whole file"),
    "x.txt.gz": (gzip.compress(LONG.encode()), r"the whole file"),
    "x.parquet": (parquet_bytes(TABLE), r"row 2"),
    "x.arrow": (arrow_bytes(TABLE), r"row 2"),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_record_too_large(tmp_path, name):
    content, place = TOO_LARGE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}, .*({place}).*: a record larger than 1 MiB.*raise --max_record_mb"):
        converted(tmp_path / name, tmp_path / "p", max_record_mb=1)
    if name != "nolines.jsonl":
        texts, _ = converted(tmp_path / name, tmp_path / "p", max_record_mb=2)
        assert len(texts[-1]) in (len(LONG), 1_600_000)


def bombs(folder):
    """Small files with records too large for 450 MB of memory, though none exceeds max_record when
    stored.
    """
    word = "b" * 10_000_000
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 60, pyarrow.int32()), pyarrow.array([word]))
    (folder / "dictionary.parquet").write_bytes(parquet_bytes(pyarrow.table({"text": texts}), compression="zstd"))
    nested = pyarrow.array([[{"role": "user", "content": word}]] * 60)
    (folder / "nested.parquet").write_bytes(parquet_bytes(pyarrow.table({"messages": nested}), compression="zstd"))
    (folder / "dictionary.arrow").write_bytes(arrow_bytes(pyarrow.table({"text": texts})))
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(bytes(300_000_000), 1))
    (folder / "array.json.gz").write_bytes(gzip.compress(b'[{"text": "' + b"b" * 300_000_000, 1))
    (folder / "document.txt.gz").write_bytes(gzip.compress(bytes(300_000_000), 1))


def test_decompression_bombs_bounded_memory(tmp_path):
    """Batches are limited in bytes, and records over the limit are not read."""
    bombs(tmp_path)
    program = """
import sys
import pyarrow, pyarrow.parquet
from rwkv.data.convert import inputs, sources
from rwkv.errors import UserError
from dataclasses import replace
from rwkv.memory import machine
path = sys.argv[1]
before = machine.rss_peak()
count = 0
try:
    for chunk in inputs.chunks([replace(one, max_record=64 << 20) for one in sources.find(path).sources], ["text", "messages"]):
        for number, record in inputs.records(chunk, inputs.lines_of(chunk), ["text"]):
            count += 1
except UserError as error:
    print(str(error)[:300])
print(count, (machine.rss_peak() - before) >> 20)
"""
    for name, rows in (("dictionary.parquet", 60), ("nested.parquet", 60), ("dictionary.arrow", 60), ("lines.jsonl.gz", 0),
                       ("array.json.gz", 0), ("document.txt.gz", 0)):  # fmt: skip
        result = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / name)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{name}: {result.stderr}"
        count, used = map(int, result.stdout.splitlines()[-1].split())
        assert count == rows, (name, result.stdout)
        assert rows or "a record larger than 64 MiB" in result.stdout
        assert used < 450, f"{name}: {used} MiB"


def test_arrow_offsets_out_of_bounds(tmp_path, script):
    good = arrow_bytes(pyarrow.table({"text": ["first", "second", "third"]}))
    offsets = struct.pack("<4i", 0, 5, 11, 16)
    start = good.index(offsets)
    for wrong in (
        (0, -100_000, 11, 16),
        (0, 1_500_000_000, 11, 16),
        (0, 5, 11, 2_000_000_000),
        (0, 11, 5, 16),
        (0, 5, 11, 40),
    ):
        (tmp_path / "x.arrow").write_bytes(good[:start] + struct.pack("<4i", *wrong) + good[start + 16 :])
        result = script("convert.py", "--input", tmp_path / "x.arrow", "--workers", "1", status=1)
        assert "x.arrow: not an Arrow stream (as written by save_to_disk), or corrupt" in result.stderr
        assert "Traceback" not in result.stderr


def nested(depth):
    return "[" * depth + "]" * depth


BAD_ELEMENTS = {
    '{"text": "\\ud800"}': "half of a surrogate pair",
    '{"text": "\\ud800 and 中文"}': "half of a surrogate pair",
    f'{{"text": {"9" * 100_000}}}': '"text" is of type float',
    f'{{"text": {nested(100_000)}}}': "nested too deeply",
    f'{{"text": {nested(700)}}}': r"nested too deeply|is of type list",
    nested(5000): "nested too deeply",
    '{"text": null}': "is of type NoneType",
    "3": "it is of type int",
}


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("element", BAD_ELEMENTS, ids=lambda element: element[:30])
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_element_is_one_bad_record(tmp_path, kind, element, workers):
    elements = ['{"text": "before"}', element, '{"text": "]}\\"after", "n": ' + "7" * 10_000 + "}"]
    (tmp_path / f"x.{kind}").write_text("[" + ",\n".join(elements) + "]" if kind == "json" else "\n".join(elements))
    unit = "element" if kind == "json" else "line"
    with pytest.raises(UserError, match=rf"x.{kind}, {unit} 2: .*({BAD_ELEMENTS[element]})"):
        converted(tmp_path / f"x.{kind}", tmp_path / "p", workers=workers)
    texts, result = converted(tmp_path / f"x.{kind}", tmp_path / "p", on_error="skip", workers=workers)
    assert texts == ["before", ']}"after']
    (reject,) = map(json.loads, result.rejects_file.read_bytes().splitlines())
    assert reject["place"].endswith(f"x.{kind}, {unit} 2")


BAD_SECOND_ROWS = {
    "x.json": b'[{"text": "a"}, 3, {"text": "b"}]',
    "x.json.gz": gzip.compress(b'[{"text": "a"}, 3, {"text": "b"}]'),
    "x.csv": b"id,text\n1,a\n2\n3,b\n",
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", BAD_SECOND_ROWS)
def test_file_closed_at_error(tmp_path, name, workers):
    """Even if the error is kept, with the frames that read the file."""
    (tmp_path / name).write_bytes(BAD_SECOND_ROWS[name])
    limit = csv.field_size_limit()
    with pytest.raises(UserError) as kept:
        converted(tmp_path / name, tmp_path / "p", workers=workers)
    assert kept.tb
    opened = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert str(tmp_path / name) not in opened
    assert csv.field_size_limit() == limit  # one for the process


def test_deeply_nested_element_skipped(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(f'[{{"text": "a"}}, {{"x": "[{{\\"", "text": {nested(20_000)}}}, {{"text": "b"}}]')
    for size in (3, 17, 1000):
        monkeypatch.setattr(source_file, "CHUNK", size)
        texts, result = converted(tmp_path / "x.json", tmp_path / "p", on_error="skip")
        assert (texts, result.rejects) == (["a", "b"], 1)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_unreadable_row_is_one_bad_record(tmp_path, kind):
    texts = pyarrow.StringArray.from_buffers(
        3, *pyarrow.array([b"a", b"\xff\xfe", b"c"], pyarrow.binary()).buffers()[1:]
    )
    times = pyarrow.array([0, 2**62, 0], pyarrow.timestamp("us"))
    for column, message in ((times, "cannot be read"), (texts, "cannot be read")):
        if kind == "arrow" and column is texts:
            continue  # the whole batch is invalid and rejected
        table = pyarrow.table(
            {"text": pyarrow.array(["x", "y", "z"]), "messages": column} if column is times else {"text": column}
        )
        (tmp_path / f"x.{kind}").write_bytes(arrow_bytes(table) if kind == "arrow" else parquet_bytes(table))
        keys = "messages" if column is times else "text"
        with pytest.raises(UserError, match=rf"x.{kind}, row {1 if column is times else 2}: "):
            converted(tmp_path / f"x.{kind}", tmp_path / "p", jsonl_keys=keys)
        if column is texts:
            found, result = converted(tmp_path / f"x.{kind}", tmp_path / "p", on_error="skip")
            assert (found, result.rejects) == (["a", "c"], 1)
            assert message in result.rejects_file.read_text()


def test_npz_named_npy(tmp_path):
    np.savez(tmp_path / "x.npz", ids=np.arange(9))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(UserError, match=r"x.npy: an .npz archive \(containing ids\) despite its name; save the array"):
        char_level.array_to_binidx(str(tmp_path / "x.npy"), str(tmp_path / "p"))
    for content in (b"", b"PK\x03\x04 broken", b"\x93NUMPY"):
        (tmp_path / "y.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"y.npy: not a .npy file of numbers"):
            char_level.array_to_binidx(str(tmp_path / "y.npy"), str(tmp_path / "p"))
