"""Text that is not UTF-8: detection, advice, --encoding; CRLF line endings."""

import gzip
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from rwkv.config import ConvertConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert import encodings, source_file
from rwkv.data.convert.pipeline import convert
from rwkv.data.inspection import inspect
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError

CHINESE = "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。他说：“我不知道。”\n第二天早上，大家都来了。"
TRADITIONAL = "天地玄黃，宇宙洪荒。他說：「我不知道。」\n第二天早上，大家都來了。"
JAPANESE = "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。"
KOREAN = "나는 고양이로소이다. 이름은 아직 없다.\n어디서 태어났는지 도무지 모른다."
GERMAN = (
    "Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte,\nfand er sich in seinem Bett über größeren Füßen."
)
SAMPLES = [
    (CHINESE, "gbk", "gb18030", "GBK"),
    (CHINESE + "㐂", "gb18030", "gb18030", "GBK"),
    (TRADITIONAL, "big5", "big5", "Big5"),
    (JAPANESE, "shift_jis", "shift_jis", "Shift-JIS"),
    (JAPANESE, "euc_jp", "euc_jp", "EUC-JP"),
    (KOREAN, "euc_kr", "euc_kr", "EUC-KR"),
    (GERMAN, "cp1252", "cp1252", "Windows-1252"),
    (CHINESE, "utf-16", "utf-16", "UTF-16"),
    (GERMAN, "utf-16-le", "utf-16-le", "UTF-16"),
    (GERMAN, "utf-16-be", "utf-16-be", "UTF-16"),
]


def converted(source, prefix, **flags):
    result = convert(
        ConvertConfig(**{"input": str(source), "output_prefix": str(prefix), "workers": 1, "force": True, **flags})
    )
    data = Dataset(result.pairs[0][0])
    return [WorldTokenizer().decode(data.document(i)[:-1]) for i in range(len(data))]


def encoded(kind, texts, encoding):
    records = [{"text": text} for text in texts]
    content = {
        "jsonl": lambda: "".join(json.dumps(record, ensure_ascii=False) + "\r\n" for record in records),
        "json": lambda: json.dumps(records, ensure_ascii=False),
        "csv": lambda: "text\n" + "".join(f'"{text}"\n' for text in texts),
        "txt": lambda: texts[0],
    }[kind]()
    return content.encode(encoding)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize(("text", "encoding", "advised", "name"), SAMPLES)
def test_encoding_guess_and_advice(tmp_path, kind, text, encoding, advised, name):
    if encoding == "utf-16-le" and kind == "txt":
        text = "A" + text
    texts = [text] if kind == "txt" else [text, "plain", text * 3]
    source = tmp_path / f"x.{kind}"
    source.write_bytes(encoded(kind, texts, encoding))
    if b"\0" not in source.read_bytes():
        with pytest.raises(
            UserError, match=rf"x.{kind}.*: not UTF-8 .*; it looks like {name}. Pass --encoding {advised}, or save"
        ):
            converted(source, tmp_path / "p")
    assert converted(source, tmp_path / "p", encoding=advised) == texts
    assert encodings.guess(source.read_bytes()) == advised


@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv"])
def test_utf16_detected(tmp_path, kind):
    (tmp_path / f"x.{kind}").write_bytes(encoded(kind, [CHINESE], "utf-16"))
    with pytest.raises(UserError, match=r"it looks like UTF-16. Pass --encoding utf-16"):
        converted(tmp_path / f"x.{kind}", tmp_path / "p")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_bom_detected(tmp_path, kind, encoding):
    """English in UTF-16 is valid UTF-8, with a NUL after every letter."""
    texts = ["It was the best of times"] if kind == "txt" else ["It was the best of times", "it was the worst of times"]
    (tmp_path / f"x.{kind}").write_bytes(encoded(kind, texts, encoding))
    with pytest.raises(UserError, match=rf"x.{kind}: not UTF-8.* it looks like UTF-16. Pass --encoding {encoding}"):
        converted(tmp_path / f"x.{kind}", tmp_path / "p", on_error="skip")
    assert converted(tmp_path / f"x.{kind}", tmp_path / "p", encoding=encoding) == texts


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "big5", "shift_jis", "utf-16", "utf-32", "euc_jp"])
@pytest.mark.parametrize("compressed", [False, True])
def test_multibyte_characters_at_chunk_boundaries(tmp_path, monkeypatch, encoding, compressed):
    text = JAPANESE if "j" in encoding else TRADITIONAL if encoding == "big5" else CHINESE
    texts = [text[i:] + "x" * (i % 3) for i in range(20)]
    content = encoded("jsonl", texts, encoding)
    (tmp_path / f"x.jsonl{'.gz' * compressed}").write_bytes(gzip.compress(content) if compressed else content)
    monkeypatch.setattr(source_file, "DECODE_BLOCK", 7)
    for size in (5, 64, 1000):
        monkeypatch.setattr(source_file, "CHUNK", size)
        for workers in (1, 2):
            assert (
                converted(next(tmp_path.glob("x.*")), tmp_path / "out/p", encoding=encoding, workers=workers) == texts
            )


def test_folder_with_mixed_encodings(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(1, 13):
        (folder / f"第{i}章.txt").write_bytes(f"第{i}章\n{CHINESE}".encode("gbk" if i % 4 == 0 else "utf-8"))
    with pytest.raises(
        UserError,
        match=r"第4章.txt: not UTF-8 .* looks like GBK.* \(3 of 12 files are not UTF-8: 第4章.txt, 第8章.txt, 第12章.txt\)",
    ):
        converted(folder, tmp_path / "p")
    assert converted(folder, tmp_path / "p", encoding="gbk") == [f"第{i}章\n{CHINESE}" for i in range(1, 13)]
    assert "encoding: 3 files read as gbk, 9 are UTF-8 and read as such" in capsys.readouterr().err


RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему."


@pytest.mark.parametrize(
    ("text", "encoding", "guess"),
    [
        (RUSSIAN, "cp1251", "cp1251"),
        (RUSSIAN, "koi8-r", "koi8-r"),
        (RUSSIAN, "cp866", "cp866"),
        (RUSSIAN, "iso8859-5", "iso8859-5"),
        ('{"text": "déjà vu à l\'école"}', "latin-1", "cp1252"),
        ("Ας αρχίσουμε από την αρχή, όπως πάντα.", "cp1253", ""),  # all bytes are letters in Windows-1252 too
        ("It was the best of times", "utf-32", "utf-32"),
    ],
)
def test_guess_of_other_alphabets(text, encoding, guess):
    assert encodings.guess(text.encode(encoding)) == guess


@pytest.mark.parametrize("encoding", ["euc_jp", "shift_jis", "utf-16-le", "koi8-r", "gb18030"])
def test_advised_command_works(tmp_path, encoding):
    text = RUSSIAN if encoding == "koi8-r" else JAPANESE if "j" in encoding else CHINESE + " a" * 200
    source = tmp_path / "x.txt"
    source.write_bytes(text.encode(encoding))
    found = source_file.Source(source, "txt", "", source.stat().st_size)
    command = encodings.advice(found, [found]).split(": ", 1)[1].removesuffix(" > new.txt")
    assert subprocess.run(shlex.split(command), capture_output=True, check=True).stdout.decode() == text


def test_text_that_is_valid_utf8_by_chance(tmp_path):
    for text, encoding, says in (
        (JAPANESE, "iso2022_jp", "it looks like ISO-2022-JP. Pass --encoding iso2022_jp"),
        ("hello", "utf-16-le", "it looks like UTF-16. Pass --encoding utf-16-le"),
    ):
        (tmp_path / "x.txt").write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=says):
            converted(tmp_path / "x.txt", tmp_path / "p")
        assert converted(tmp_path / "x.txt", tmp_path / "p", encoding=encoding) == [text]
    (tmp_path / "x.txt").write_bytes(b"a\rb\r")
    with pytest.raises(UserError, match="the lines end with a carriage return alone; convert it: tr"):
        converted(tmp_path / "x.txt", tmp_path / "p", split_lines=True)


def test_utf8_with_errors_not_misdetected(tmp_path):
    (tmp_path / "x.txt").write_bytes(CHINESE.encode() + b"\xff" + CHINESE.encode())
    with pytest.raises(
        UserError, match=r"x.txt: not UTF-8 .*; save the file as UTF-8, or pass its encoding as --encoding NAME$"
    ):
        converted(tmp_path / "x.txt", tmp_path / "p")
    assert encodings.guess(CHINESE.encode()) == ""


def test_invalid_line_is_bad_record(tmp_path):
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode("gbk") for text in ("一", "二", "三")]
    lines[1] = lines[1].replace("二".encode("gbk"), b"\xff\xff")
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"x.jsonl, line 2: not gbk"):
        converted(tmp_path / "x.jsonl", tmp_path / "p", encoding="gbk")
    assert converted(tmp_path / "x.jsonl", tmp_path / "p", encoding="gbk", on_error="skip") == ["一", "三"]


@pytest.mark.parametrize("name", ["gb", "nonsense", "base64", "zlib", "rot13", "hex", "idna", "../gbk", "\0"])
def test_unknown_encoding(tmp_path, name):
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(UserError, match=r"no such text encoding; for example gb18030"):
        converted(tmp_path / "x.txt", tmp_path / "p", encoding=name)


def test_encoding_flag_with_parquet(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"--encoding gbk: parquet and arrow files define their own encoding"):
        converted(tmp_path / "x.parquet", tmp_path / "p", encoding="gbk")


def test_crlf_normalised_in_txt(tmp_path):
    for name, content, expected in (
        ("windows.txt", b"\xef\xbb\xbfa\r\nb\r\n\r\nc", "a\nb\n\nc"),
        ("mac.txt", b"a\rb\rc", "a\nb\nc"),
        ("mixed.txt", b"a\r\nb\nc\rd", "a\nb\nc\rd"),
    ):
        (tmp_path / name).write_bytes(content)
        assert converted(tmp_path / name, tmp_path / "p") == [expected]
    assert converted(tmp_path / "windows.txt", tmp_path / "kept", keep_crlf=True) == ["a\r\nb\r\n\r\nc"]
    assert converted(tmp_path / "windows.txt", tmp_path / "p", split_lines=True) == ["a", "b", "c"]
    (remark,) = [text for text in inspect(Dataset(tmp_path / "kept_text_document"), 4, 1).remarks if "CRLF" in text]
    assert "1 of 1 documents sampled have CRLF line endings" in remark
    assert not any("CRLF" in text for text in inspect(Dataset(Path(tmp_path / "p_text_document")), 4, 1).remarks)
