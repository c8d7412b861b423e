"""jsonl: documents round-trip; errors name file and line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv.config import ConvertConfig
from rwkv.data.convert.pipeline import convert
from rwkv.data.convert.pipeline import texts as documents
from rwkv.errors import UserError


def read(path, key="text"):
    return [text for text, _ in documents(ConvertConfig(input=str(path), jsonl_keys=key))[0]]


@given(texts=st.lists(st.text(st.characters(blacklist_categories=["Cs"])).filter(str.strip), min_size=1))
def test_unicode_roundtrip(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert read(path) == texts


def test_blank_lines_crlf_and_bom(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff\r\n{"text": "a"}\r\n\r\n{"text": ""}\r\n{"text": "b"}'.encode())
    assert read(path) == ["a", "b"]


def test_text_list_joined_and_key_selects(write_jsonl):
    assert read(write_jsonl({"body": ["a", "b"], "text": "no"}), "body") == ["a\n\nb"]


def test_progress_reaches_file_size(write_jsonl):
    path = write_jsonl({"text": "a"}, {"text": "bc"})
    found, size = documents(ConvertConfig(input=str(path)))
    assert [position for _, position in found][-1] == size == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json}", "not JSON"),
        (b'{"txt": "a"}', "no \"text\" \\(it has 'txt'\\)"),
        (b'["a"]', 'no "text" \\(it is of type list\\)'),
        (b'{"text": 3}', "is of type int, not a string"),
        (b'{"text": ["a", 1]}', "is of type list, not a string"),
        (b'{"text": "\xff"}', "not UTF-8 \\(byte 11 of the line is 0xff\\)"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "cut', "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_line_error(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"bad.jsonl, line 3: .*{message}"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"text": "a"},\n{"text": "b"},\n',
            r"line 1: not JSON: there is a comma after the closing \}; a .jsonl file has one object per line",
        ),
        (
            b'{"text": "a"}\n[\n{"text": "b"}\n]\n',
            r"line 2: not JSON: part of a JSON array over several lines.* name the file .json",
        ),
        (
            b'{"text": "a"}\n{\n  "text": "b"\n}\n',
            r"line 2: not JSON: the value does not end on this line.* write each on one line",
        ),
        (b'{\n  "text": "b"\n}\n', r"line 1: not JSON: the value does not end on this line"),
        (b"{'text': 'a'}\n", r'line 1: not JSON: single quotes; JSON needs "double quotes", at column 2'),
        (b"{\"text\": 'a'}\n", r'line 1: not JSON: single quotes; JSON needs "double quotes", at column 10'),
        (b'{"text": "a",}\n', r"line 1: not JSON: a comma before the closing \}; remove it"),
        (
            b'{"text": "a"}\n' + bytes(40) + b"\n",
            r"line 2: not JSON: 40 NUL bytes, as left by a crash or a full disk",
        ),
        (
            b'{"text": "a"}\r{"text": "b"}\r{"text": "c"}',
            r"line 1: not JSON: the lines end with a carriage return alone; convert it: tr",
        ),
        (b'{"text": "a\tb"}\n', r"line 1: not JSON: a tab or another control character inside a string; write \\t"),
        (b'{"text": "he said "hi""}\n', r'line 1: not JSON: unexpected text after a value: .* must be written \\"'),
        (b'{"text": "a", "b": None}\n', r"line 1: not JSON: None; JSON writes null, true, false, at column 20"),
        (b'{text: "a"}\n', r"line 1: not JSON: a name without quotes"),
        (b'{"text": "a"} {"text": "b"}\n', r"line 1: not JSON: there is more after the first value, at column 15"),
        (
            b'{"text": "cut sh\n{"text": "b"}',
            r"line 1: not JSON: the string that begins at column 10 does not end on this line",
        ),
        (b"<!DOCTYPE html>\n<html>\n", r"line 1: not JSON: a web page"),
        (b"// a\n", r"line 1: not JSON: a comment; JSON has none"),
        (b'{"text": "a" # b\n}', r"line 1: not JSON: a comment"),
        (
            b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n',
            r"line 2: not JSON: a byte order mark \(U\+FEFF\) at the start of the line",
        ),
        (b'["a"]\n["b"]\n', r'line 1: no "text" \(it is of type list\)'),
    ],
)
def test_not_jsonl_explained(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"x.jsonl, {message}.*skip it: scripts/convert.py --on_error skip"):
        read(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '[\n{"text": "a"},\n{"text": "b"}\n]\n',
        '\ufeff[{"text": "a"},\n{"text": "b"}]',
    ],
)
def test_jsonl_containing_array(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content, encoding="utf-8")
    assert read(tmp_path / "x.jsonl") == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},]', r"a comma before the closing \]"),
        ("[{'text': 'a'}]", "single quotes"),
        ('[{"text": None}]', "None; JSON writes null"),
    ],
)
def test_array_error(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=rf"x.json, element \d: not JSON \({message}"):
        read(tmp_path / "x.json")


def test_foreign_eod_markers_counted(write_jsonl, tmp_path, byte_tokenizer):
    source = write_jsonl({"text": "a<|endoftext|>b<|endoftext|>"}, {"text": "c"}, {"text": "<|end_of_text|>"})
    flags = {"input": str(source), "output_prefix": str(tmp_path / "p"), "workers": 1}
    (warning,) = convert(ConvertConfig(**flags)).report
    assert warning.startswith("warning: <|endoftext|> or similar in the texts")
    assert warning.endswith(": 3")
    other = {"tokenizer_type": "HFTokenizer", "vocab_file": str(byte_tokenizer[0]), "force": True}
    assert convert(ConvertConfig(**flags, **other)).report == []


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        read(tmp_path / "none.jsonl")
