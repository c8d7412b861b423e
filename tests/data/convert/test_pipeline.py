"""Conversion of files to binidx: upstream's bytes, independent of workers and shards, written
atomically.
"""

import hashlib
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv.config import ConvertConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert import inputs, source_file
from rwkv.data.convert import pipeline as converting
from rwkv.data.convert.pipeline import convert
from rwkv.data.convert.shards import merge
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError

TEXTS = ["Hello", "你好，世界", "User: 1\n\nAssistant: 2"]
SCRIPT = Path(__file__).parents[3] / "scripts/convert.py"


def run(input_, prefix, **flags):
    return convert(ConvertConfig(**{"input": str(input_), "output_prefix": str(prefix), "workers": 1, **flags}))


def upstream_bytes(documents, letter, code):
    """The expected .bin and .idx of upstream's tool, written with struct alone."""
    width = struct.calcsize(letter)
    data = b"".join(struct.pack(f"<{len(ids)}{letter}", *ids) for ids in documents)
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    index += b"".join(struct.pack("<i", len(ids)) for ids in documents)
    offset = 0
    for ids in documents:
        index += struct.pack("<q", offset)
        offset += width * len(ids)
    return data, index + b"".join(struct.pack("<q", i) for i in range(len(documents) + 1))


def pair(prefix):
    return tuple(Path(f"{prefix}{end}").read_bytes() for end in (".bin", ".idx"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(source_file, "CHUNK", 50)


@pytest.mark.parametrize(("dtype", "letter", "code"), [("uint16", "H", 8), ("int32", "i", 4)])
@pytest.mark.parametrize("append_eod", [True, False])
def test_world_bytes_match_upstream(write_jsonl, tmp_path, dtype, letter, code, append_eod):
    write_jsonl(*({"text": text} for text in TEXTS), {"text": ""}, name="a.jsonl")
    write_jsonl({"text": "more"}, name="b.jsonl")
    result = run(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", tmp_path / "new/out", dtype=dtype, append_eod=append_eod)
    expected = [WorldTokenizer().encode(text) + [0] * append_eod for text in [*TEXTS, "more"]]
    prefix = str(tmp_path / "new/out_text_document")
    assert result.pairs == [(prefix, 4, sum(map(len, expected)))]
    assert pair(prefix) == upstream_bytes(expected, letter, code)
    assert names(tmp_path / "new") == ["out_text_document.bin", "out_text_document.idx", "out_text_document.json"]


def test_20b_bytes_match_upstream(write_jsonl, tmp_path, byte_tokenizer):
    path, ids = byte_tokenizer
    text = write_jsonl({"text": "Hell"}, {"text": "e\u0301<|endoftext|>"})
    run(text, tmp_path / "out", tokenizer_type="HFTokenizer", vocab_file=str(path))
    # NFC; the alphabet maps bytes above 0xa1 to themselves
    composed = [ids[chr(byte)] for byte in "é".encode()]
    assert pair(tmp_path / "out_text_document") == upstream_bytes([[257, 258, 0], [*composed, 0, 0]], "H", 8)


def test_wrong_vocabulary(write_jsonl, tmp_path, byte_tokenizer):
    text, world = write_jsonl({"text": "a"}), tmp_path / "rwkv_vocab_v20230424.txt"
    # upstream's command names the file, but it need not exist
    run(text, tmp_path / "as_upstream", vocab_file=str(world))
    world.write_bytes(b"1 '\\x00' 1\r\n")
    with pytest.raises(UserError, match=r"not the World vocabulary, which is built in"):
        run(text, tmp_path / "out", vocab_file=str(world))
    from rwkv.data import tokenizer

    world.write_bytes(tokenizer._vocabulary().read_bytes().replace(b"\n", b"\r\n"))
    run(text, tmp_path / "out", vocab_file=str(world))
    with pytest.raises(UserError, match=r"none.json: no such file. --tokenizer_type HFTokenizer needs"):
        run(text, tmp_path / "x", tokenizer_type="HFTokenizer", vocab_file="none.json")
    with pytest.raises(UserError, match=r"text.jsonl: not a tokenizer.json"):
        run(text, tmp_path / "x", tokenizer_type="HFTokenizer", vocab_file=str(text))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(blacklist_categories=["Cs"])).filter(str.strip), min_size=1))
def test_unicode_roundtrip_through_tokens(write_jsonl, tmp_path, texts):
    run(write_jsonl(*({"text": text} for text in texts)), tmp_path / "out", append_eod=False, force=True)
    data = Dataset(tmp_path / "out_text_document")
    assert [WorldTokenizer().decode(data.document(i)) for i in range(len(data))] == texts


def make_inputs(folder):
    """A folder of several formats, including bad records."""
    draw = random.Random(1)
    texts = ["a" + "".join(draw.choice("ab 好\n😀") for _ in range(draw.randrange(1, 60))) for _ in range(300)]
    folder.mkdir()
    lines = [json.dumps({"text": text, "title": f"t{i}"}) for i, text in enumerate(texts[:150])]
    lines[70] = '{"text": 3}'
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.json").write_text(json.dumps([{"text": text, "title": "b"} for text in texts[150:200]] + [{"no": 1}]))
    for i, text in enumerate(texts[200:260]):
        (folder / f"c{i:02}.txt").write_text(text)
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": text, "title": "d"}) + "\n" for text in texts[260:]))
    return texts


def outputs(folder, prefix):
    return {
        path.name.removeprefix(prefix): path.read_bytes()
        for path in folder.iterdir()
        if path.name.startswith(f"{prefix}_")
    } | {"rejects": (folder / f"{prefix}.rejects.jsonl").read_text().replace(prefix, "")}


def test_bytes_independent_of_workers_and_shards(tmp_path, small_chunks):
    make_inputs(tmp_path / "in")
    flags = {"on_error": "skip", "jsonl_keys": "text,title"}
    for workers in (1, 2, 3):
        result = run(tmp_path / "in", tmp_path / f"by-{workers}", workers=workers, **flags)
        assert result.rejects == 2
    expected = outputs(tmp_path, "by-1")
    assert len(expected) == 7
    assert outputs(tmp_path, "by-2") == outputs(tmp_path, "by-3") == expected
    for n in (2, 5):
        for i in range(n):
            run(tmp_path / "in", tmp_path / f"in-{n}", shard=f"{i}/{n}", workers=1 + i % 2, **flags)
        pairs = merge(str(tmp_path / f"in-{n}"), force=False)
        assert [documents for _, documents, _ in pairs] == [299, 299]
        merged = {name: data for name, data in outputs(tmp_path, f"in-{n}").items() if "-of-" not in name}
        assert merged == expected


def test_mismatched_shards(write_jsonl, tmp_path):
    text = write_jsonl(*({"text": f"{i}"} for i in range(9)))
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"no finished shards"):
        merge(out, False)
    run(text, out, shard="0/2")
    with pytest.raises(UserError, match=r"shard 1/2 is missing"):
        merge(out, False)
    run(text, out, shard="1/2", append_eod=False)
    with pytest.raises(
        UserError, match=r"out.00001-of-00002: was created with other flags than .*out.00000-of-00002; run it again"
    ):
        merge(out, False)
    run(text, out, shard="1/2", force=True)
    merge(out, False)
    with pytest.raises(UserError, match=r"already exist; pass --force"):
        merge(out, False)
    (tmp_path / "out.00001-of-00002.shard").write_text("[]")
    with pytest.raises(UserError, match=r"out.00001-of-00002.shard: is corrupt; run this shard again"):
        merge(out, True)
    run(text, out, shard="0/3")
    with pytest.raises(UserError, match=r"shards of 2 and of 3 are mixed"):
        merge(out, True)
    for wrong in ("2/2", "1", "-1/2", "a/b"):
        with pytest.raises(UserError, match=r"expected i/n with i from 0 to n - 1"):
            run(text, out, shard=wrong)


def test_bad_record_stops(tmp_path, small_chunks):
    make_inputs(tmp_path / "in")
    before = names(tmp_path)
    for flags in ({"workers": 1}, {"workers": 2}, {"shard": "0/2"}, {"shard": "2/9"}):
        with pytest.raises(UserError, match=r"in/a.jsonl, line 71: \"text\" is of type int, not a string"):
            run(tmp_path / "in", tmp_path / "out", **flags)
    with pytest.raises(UserError, match=r"in/b.json, element 51: no \"text\" \(it has 'no'\)"):
        run(tmp_path / "in/b.json", tmp_path / "out")
    assert names(tmp_path) == before


def test_skipped_records_written(tmp_path, small_chunks):
    texts = make_inputs(tmp_path / "in")
    result = run(tmp_path / "in", tmp_path / "out", on_error="skip", workers=2)
    assert (result.rejects, result.pairs[0][1]) == (2, 299)
    first, second = map(json.loads, result.rejects_file.read_text().splitlines())
    assert first == {
        "place": f"{tmp_path}/in/a.jsonl, line 71",
        "error": '"text" is of type int, not a string',
        "record": '{"text": 3}',
    }
    assert second["place"] == f"{tmp_path}/in/b.json, element 51"
    data = Dataset(tmp_path / "out_text_document")
    assert WorldTokenizer().decode(data.document(70)) == texts[71]
    (tmp_path / "in/a.jsonl").write_text('{"text": "a"}')
    run(tmp_path / "in/a.jsonl", tmp_path / "out", force=True)
    assert not result.rejects_file.exists()  # it described other data


def test_existing_output_needs_force(write_jsonl, tmp_path):
    prefix = run(write_jsonl({"text": "old"}), tmp_path / "out", append_eod=False).pairs[0][0]
    new = write_jsonl({"text": "new and longer"})
    with pytest.raises(UserError, match="already exist; pass --force"):
        run(new, tmp_path / "out")
    assert WorldTokenizer().decode(Dataset(prefix).tokens) == "old"
    run(new, tmp_path / "out", append_eod=False, force=True)
    assert WorldTokenizer().decode(Dataset(prefix).tokens) == "new and longer"
    Path(f"{prefix}.idx").unlink()
    # an output without its index also needs --force
    with pytest.raises(UserError, match=r"out_text_document.bin already exist"):
        run(new, tmp_path / "out")


def test_input_not_overwritten(tmp_path):
    source = tmp_path / "p_text_document.json"
    source.write_text('[{"text": "a"}]')
    with pytest.raises(UserError, match=r"p_text_document.json: the conversion would overwrite its own input"):
        run(source, tmp_path / "p", force=True)
    assert source.read_text() == '[{"text": "a"}]'


def test_nothing_to_convert(tmp_path):
    (tmp_path / "empty.jsonl").write_text('\n{"text": ""}\n')
    with pytest.raises(UserError, match=r'empty.jsonl: contains no document. Expected records such as {"text": "..."}'):
        run(tmp_path / "empty.jsonl", tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text("x\n")
    with pytest.raises(
        UserError, match=r"bad.jsonl: contains no document that can be read: 1 bad records were skipped"
    ):
        run(tmp_path / "bad.jsonl", tmp_path / "out", on_error="skip")
    with pytest.raises(UserError, match="--input is missing"):
        run("", tmp_path / "out")
    assert names(tmp_path) == ["bad.jsonl", "empty.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"jsonl_keys": " ,"}, "--jsonl-keys is empty"),
        ({"output_prefix": "/"}, "--output-prefix /: not the beginning of a file name"),
        ({"output_prefix": "."}, "--output-prefix .: not the beginning of a file name"),
        ({"workers": -1}, "--workers -1: must be from 0 to 1,024"),
        ({"workers": 1 << 40}, "--workers 1099511627776: must be from 0 to 1,024"),
        ({"max_record_mb": 1 << 62}, "--max_record_mb 4611686018427387904: must be from 1 to"),
    ],
)
def test_flags_out_of_range(write_jsonl, tmp_path, flags, message):
    source = write_jsonl({"text": "a"})
    with pytest.raises(UserError, match=re.escape(message)):
        convert(ConvertConfig(**{"input": str(source), "output_prefix": str(tmp_path / "out"), **flags}))
    assert names(tmp_path) == ["text.jsonl"]


def test_repeated_key_is_written_once(write_jsonl, tmp_path):
    done = run(write_jsonl({"text": "a"}), tmp_path / "out", jsonl_keys="text,text")
    assert done.pairs == [(str(tmp_path / "out_text_document"), 1, 2)]


def test_ftfy(write_jsonl, tmp_path):
    text = write_jsonl({"text": "donâ€™t"})
    run(text, tmp_path / "unchanged", append_eod=False)
    run(text, tmp_path / "repaired", append_eod=False, ftfy=True)
    unchanged, repaired = (
        WorldTokenizer().decode(Dataset(tmp_path / f"{name}_text_document").tokens)
        for name in ("unchanged", "repaired")
    )
    assert (unchanged, repaired) == ("donâ€™t", "don't")


@pytest.mark.parametrize(
    ("spec", "prefix"),
    [
        ("x/mine.jsonl", "x/mine"),
        ("x/mine.json.gz", "x/mine"),
        ("x/v1.5.txt.zst", "x/v1.5"),
        ("x", "x"),
        ("x/*.json.gz", "x/mine"),
    ],
)
def test_default_output_prefix(tmp_path, monkeypatch, spec, prefix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for name in ("mine.jsonl", "mine.json.gz", "v1.5.txt.zst"):
        (tmp_path / "x" / name).touch()
    sources = [inputs.Source(Path("x/mine.json.gz"), "json", "gzip", 0)]
    assert converting.default_prefix(spec, sources) == prefix


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_disk_full(write_jsonl, tmp_path):
    text = write_jsonl(*({"text": "word " * 1000} for _ in range(100)))
    command = [sys.executable, str(SCRIPT), "--input", str(text), "--workers", "2"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_file_size, check=False)
    assert result.returncode == 1
    assert "text_text_document.bin: the file exceeds the maximum file size; free some space" in result.stderr
    assert "Traceback" not in result.stderr
    assert names(tmp_path) == ["text.jsonl"]


def test_killed_worker(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(converting.Encoder, "__call__", lambda self, chunk: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a worker process was killed, probably out of memory"):
        run(write_jsonl({"text": "a"}), tmp_path / "out", workers=2)
    assert names(tmp_path) == ["text.jsonl"]


def test_kill_at_random_time_then_rerun(tmp_path):
    """Twenty runs are killed with SIGKILL at random times, unless they end before. If the index is
    visible afterwards, the output must be complete.
    """
    text = tmp_path / "in.jsonl"
    chats = [
        {"messages": [{"role": "user", "content": f"{i} " * 50}, {"role": "assistant", "content": f"{i}?" * 400}]}
        for i in range(1500)
    ]
    text.write_text("".join(json.dumps(record) + "\n" for record in chats))
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "--input", str(text), "--output-prefix", str(out / "p"), "--workers", "2"]
    started = time.monotonic()
    subprocess.run(command, capture_output=True, check=True)
    duration = time.monotonic() - started
    digest = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    assert sorted(digest) == ["p_text_document.bin", "p_text_document.idx", "p_text_document.json", "p_text_mask.bin"]
    killed = 0
    draw = random.Random(4)
    for moment in [draw.uniform(0.2, 0.95) for _ in range(20)]:
        for path in out.iterdir():
            if not path.name.startswith("."):
                path.unlink()
        started = time.monotonic()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            child.wait(duration * moment)
            duration = time.monotonic() - started  # the first run was slower
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            killed += 1
        visible = {path.name for path in out.iterdir() if not path.name.startswith(".")}
        if "p_text_document.idx" in visible:  # the index is written last
            assert {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in visible} == digest
        else:
            with pytest.raises(UserError, match=r"p_text_document.idx: no such file"):
                Dataset(out / "p_text_document")
    assert killed >= 5
    complete = (out / "p_text_document.idx").exists()
    subprocess.run([*command, *(["--force"] if complete else [])], capture_output=True, check=True)
    assert {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()
    } == digest  # and no temporary files are left


def test_kill_between_renames_then_rerun(write_jsonl, tmp_path, monkeypatch):
    text = write_jsonl({"text": "a"})
    program = f"""
import os, sys
sys.argv = ["convert.py", "--input", {str(text)!r}, "--workers", "1"]
import runpy
replace = os.replace
def once(old, new):
    replace(old, new)
    os._exit(9)
os.replace = once
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 9
    visible = [name for name in names(tmp_path) if not name.startswith(".")]
    assert visible == ["text.jsonl", "text_text_document.bin"]
    assert len(names(tmp_path)) > 2
    run(text, tmp_path / "text")
    assert names(tmp_path) == [
        "text.jsonl",
        "text_text_document.bin",
        "text_text_document.idx",
        "text_text_document.json",
    ]
