"""Documents come out of jsonl as they are; a bad line is named by file and number."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv.config import ConvertConfig
from rwkv.data.convert import texts as documents
from rwkv.errors import UserError


def read(path, key="text"):
    return [text for text, _ in documents(ConvertConfig(input=str(path), jsonl_keys=key))[0]]


@given(texts=st.lists(st.text(st.characters(blacklist_categories=["Cs"])).filter(str.strip), min_size=1))
def test_any_unicode_comes_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert read(path) == texts


def test_blank_lines_empty_texts_crlf_bom_and_a_missing_last_newline_do_no_harm(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff\r\n{"text": "a"}\r\n\r\n{"text": ""}\r\n{"text": "b"}'.encode())
    assert read(path) == ["a", "b"]


def test_a_list_of_texts_is_joined_by_blank_lines_and_keys_select(write_jsonl):
    assert read(write_jsonl({"body": ["a", "b"], "text": "no"}), "body") == ["a\n\nb"]


def test_bytes_read_so_far_end_at_the_size_of_the_file(write_jsonl):
    path = write_jsonl({"text": "a"}, {"text": "bc"})
    found, size = documents(ConvertConfig(input=str(path)))
    assert [done for _, done in found][-1] == size == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{not json}", "not JSON"),
        (b'{"txt": "a"}', "no \"text\" \\(it has 'txt'\\)"),
        (b'["a"]', 'no "text" \\(it is a list\\)'),
        (b'{"text": 3}', "is a int, not a string"),
        (b'{"text": ["a", 1]}', "is a list, not a string"),
        (b'{"text": "\xff"}', "not UTF-8 \\(byte 11 of the line is 0xff\\)"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "cut', "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"bad.jsonl, line 3: .*{complaint}"):
        read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        read(tmp_path / "none.jsonl")
