"""Documents of all file formats round-trip; errors name file and location."""

import bz2
import csv
import gzip
import io
import json

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from rwkv.data.convert import inputs, source_file, sources
from rwkv.data.convert.jsonl import BadRecord
from rwkv.errors import UserError

# blank texts are skipped
TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=40).filter(str.strip)
NO_NUL = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")).filter(
    str.strip
)  # csv of Python 3.10 rejects NUL
ONE_LINE = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\n\r"), min_size=1).filter(
    str.strip
)


def as_jsonl(texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def as_csv(texts):
    out = io.StringIO(newline="")
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([["id", "text"], *([1, text] for text in texts)])
    return out.getvalue().encode()


def as_parquet(texts):
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": [1] * len(texts), "text": texts}), out, row_group_size=2)
    return out.getvalue()


def as_arrow(texts):
    table, out = pyarrow.table({"text": texts}), io.BytesIO()
    with pyarrow.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return out.getvalue()


def zstd(data):
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


KINDS = {
    "jsonl": (TEXT, as_jsonl),
    "json": (
        TEXT,
        lambda texts: json.dumps([{"id": 1, "text": text} for text in texts], indent=1, ensure_ascii=False).encode(),
    ),
    "csv": (NO_NUL, as_csv),
    "parquet": (TEXT, as_parquet),
    "arrow": (TEXT, as_arrow),
    "txt": (ONE_LINE, lambda texts: "".join(f"{text}\r\n" for text in texts).encode()),
}
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def read(spec, shard=(0, 1), split_lines=True, keys=("text",), **flags):
    found = []
    for chunk in inputs.chunks(sources.find(str(spec), split_lines, **flags).sources, keys, shard):
        found += [record for _, record in inputs.records(chunk, inputs.lines_of(chunk), keys)]
    return [record if isinstance(record, BadRecord) else record[keys[0]] for record in found]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(source_file, "CHUNK", 7)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_unicode_roundtrip(tmp_path, small_chunks, kind, compression, data):
    strategy, write = KINDS[kind]
    texts = data.draw(st.lists(strategy, min_size=1, max_size=8))
    path = tmp_path / f"x.{kind}{compression}"
    path.write_bytes(COMPRESSIONS[compression](write(texts)))
    assert read(path) == texts
    # three shards have the same contents as one file
    assert [text for i in range(3) for text in read(path, (i, 3))] == texts


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=1, max_size=8))
def test_text_files_verbatim(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("txt")
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_bytes(text.encode())
    expected = [text.removeprefix("\ufeff") for text in texts]
    assert read(folder, split_lines=False) == expected
    assert [text for i in range(2) for text in read(folder, (i, 2), split_lines=False)] == expected


def save_to_disk(folder, texts):
    """The layout of datasets' save_to_disk, with two files."""
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (texts[:2], texts[2:]), strict=True):
        (folder / name).write_bytes(as_arrow(part))
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"})
    )
    (folder / "dataset_info.json").write_text("{}")


def test_datasets_folder(tmp_path):
    save_to_disk(tmp_path / "one", ["a", "b", "c"])
    assert read(tmp_path / "one") == ["a", "b", "c"]
    save_to_disk(tmp_path / "two/train", ["a", "b", "c"])
    save_to_disk(tmp_path / "two/test", ["d", "e", "f"])
    (tmp_path / "two/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path / "two") == ["a", "b", "c"]
    assert read(tmp_path / "two", split="test") == ["d", "e", "f"]
    assert read(tmp_path / "two", split="all") == ["a", "b", "c", "d", "e", "f"]
    assert read(tmp_path / "two/test") == ["d", "e", "f"]


def test_order_of_files_globs_and_folders(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv", "sub/d.txt", ".hidden.jsonl", "old.rejects.jsonl", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(
            as_csv([name]) if name.endswith("csv") else as_jsonl([name]) if "json" in name else name.encode()
        )
    assert read(tmp_path) == ["a.jsonl", "b.jsonl", "c.csv", "sub/d.txt"]
    assert read(f"{tmp_path}/b.jsonl, {tmp_path}/*.jsonl") == ["b.jsonl", "a.jsonl", "b.jsonl"]
    assert read(f"{tmp_path}/**/*.txt") == ["sub/d.txt"]
    (tmp_path / "a,b.txt").write_text("comma")
    assert read(tmp_path / "a,b.txt") == ["comma"]


def test_json_lines_and_tsv_detected(tmp_path):
    (tmp_path / "x.json").write_bytes(as_jsonl(["a", "b"]))
    (tmp_path / "x.tsv").write_text('text\tid\n"a, ""b"""\t1\n')
    assert read(tmp_path / "x.json") == ["a", "b"]
    assert read(tmp_path / "x.tsv") == ['a, "b"']


def test_json_values_around_text(tmp_path):
    deep = [
        {"text": "a", "n": float("nan"), "big": 10**40, "x": [{"y": "]}"}]},
        {"text": "\ud83d\ude00 \\", "z": "long " * 1000},
    ]
    (tmp_path / "x.json").write_text(f"\ufeff {json.dumps(deep)} \n")
    (tmp_path / "empty.json").write_text(" [ ] ")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in deep))
    assert read(tmp_path / "x.json") == read(tmp_path / "x.jsonl") == ["a", "😀 \\"]
    assert read(tmp_path / "empty.json") == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.json", b'[{"text": "a"}, {"text": "b"', r"x.json, element 2: not JSON"),
        ("x.json", b'[{"text": "a"}, {"text": nope}]' + b" " * 200, r"x.json, element 2: not JSON \(Expecting value"),
        ("x.json", b'[{"text": "a"}', r"x.json: truncated after element 1.* copy or download it again"),
        ("x.json", b'[{"text": "a"} {"text": "b"}]', r"x.json: after element 1 there is '\{'"),
        ("x.json", b'[{"text": "a"}]\n[{"text": "b"}]', r"x.json: there is data after the array, after element 1"),
        ("x.json", b'[{"text": "\xff"}]', r"x.json, after element 0: not UTF-8"),
        ("x.json", b"[" * 100_000, r"x.json, element 1: not JSON \(nested too deeply"),
        ("x.json", b"", r"x.json: truncated after element 0"),
        ("x.csv", b'id,text\n1,a\n2,"b', r"x.csv, line 3: not CSV \(unexpected end of data\); in a quoted field write"),
        ("x.csv", b"id,txt\n1,a\n", r"x.csv: no column \"text\" \(it has 'id', 'txt'\)"),
        ("x.csv", b"id,text\n1,\xff\n", r"x.csv, line 1 or after: not UTF-8"),
        ("x.parquet", b"PAR1 not really", r"x.parquet: not parquet, or corrupt"),
        ("x.parquet", as_parquet(["a"])[:-20], r"x.parquet: not parquet, or corrupt"),
        ("x.arrow", as_jsonl(["a"]), r"x.arrow: not an Arrow stream"),
        ("x.jsonl.gz", gzip.compress(as_jsonl(["a"] * 99), mtime=0)[:-9], r"x.jsonl.gz: corrupt or truncated"),
        ("x.jsonl.zst", zstd(as_jsonl(["a"] * 99))[:-9], r"x.jsonl.zst: corrupt or truncated"),
        ("x.jsonl.gz", b"plain", r"x.jsonl.gz: not compressed by gzip, as its name says"),
        ("x.jsonl", gzip.compress(as_jsonl(["a"]), mtime=0), r"x.jsonl: compressed by gzip; let its name end in .gz"),
        ("x.csv", zstd(b"text\na\n"), r"x.csv: compressed by zstd; let its name end in .zst"),
        ("x.json", bz2.compress(b"[]"), r"x.json: compressed by bzip2"),
        ("x.csv", b"PK\x03\x04\xff", r"x.csv: a zip archive, as .xlsx and .docx files are"),
        ("x.jsonl", as_parquet(["a"]), r"x.jsonl: a parquet file; let its name end in .parquet"),
        ("x.txt", b"version https://git-lfs.github.com/spec/v1\noid", r"x.txt: a Git LFS pointer"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid", r"x.parquet: a Git LFS pointer"),
        ("x.txt.gz", gzip.compress(b"a" * 99, mtime=0)[:-9], r"x.txt.gz: corrupt or truncated"),
        ("x.md", b"", r"x.md: unknown format; the name must end in .jsonl"),
        ("sub/x.md", b"", r"a folder without a file that can be converted"),
    ],
)
def test_corrupt_file_error(tmp_path, name, data, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name if "/" not in name else tmp_path / "sub", split_lines=False)


@pytest.mark.parametrize(
    ("spec", "message"), [("none.jsonl", "none.jsonl: no such file"), ("no*.jsonl", "matches no file")]
)
def test_missing_file_error(spec, message):
    with pytest.raises(UserError, match=message):
        sources.find(spec)


def test_bad_rows_keep_position(tmp_path):
    (tmp_path / "x.csv").write_text('id,text\n1,a\n2\n3,"c\nc"\n4,d,e\n')
    a, two, c, four = read(tmp_path / "x.csv")
    assert (a, c) == ("a", "c\nc")
    assert (str(two), str(four)) == ("1 fields, but the header has 2", "3 fields, but the header has 2")
    numbers = [
        number
        for chunk in inputs.chunks(sources.find(str(tmp_path / "x.csv")).sources, ["text"])
        for number, _ in chunk.rows
    ]
    assert numbers == [2, 3, 4, 6]


def test_line_belongs_to_chunk_of_its_start(tmp_path, monkeypatch):
    lines = [b'{"text": "%s"}' % (b"x" * n) for n in (0, 1, 50, 3, 0, 200)]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    for size in (1, 2, 13, 64, 1000):
        monkeypatch.setattr(source_file, "CHUNK", size)
        assert [
            line
            for chunk in inputs.chunks(sources.find(str(path)).sources, ["text"])
            for line in inputs.lines_of(chunk)
        ] == lines
    assert [inputs.count_lines(path, end) for end in (0, 1, 13, 14, path.stat().st_size)] == [0, 1, 1, 2, 6]
