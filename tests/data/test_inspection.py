"""Statistics equal those of plain Python; problems are found; verification detects differences from
the source.
"""

import collections
import gzip
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from rwkv import plots
from rwkv.config import ConvertConfig
from rwkv.data import histogram, inspection
from rwkv.data.binidx import Dataset, mask_path
from rwkv.data.binidx_writer import writer
from rwkv.data.convert.pipeline import convert, texts
from rwkv.data.inspection import format_report, inspect, verify
from rwkv.data.tokenizer import HFTokenizer


@pytest.fixture(scope="module")
def set_chunk():
    """Set the chunk size. The vocabulary is loaded once, not per example."""
    with pytest.MonkeyPatch.context() as patch:
        tokenizer = inspection.WorldTokenizer()
        patch.setattr(inspection, "WorldTokenizer", lambda: tokenizer)
        yield lambda size: patch.setattr(inspection, "_CHUNK", size)


def converted(source, prefix, append_eod=True) -> str:
    convert(ConvertConfig(input=str(source), output_prefix=str(prefix), append_eod=append_eod, workers=1))
    return f"{prefix}_text_document"


DOCUMENT = st.lists(st.integers(0, 300), max_size=12)


@given(
    documents=st.lists(DOCUMENT | st.sampled_from([[1, 2, 0], [0], [5] * 9]), min_size=1, max_size=30).filter(any),
    chunk=st.integers(1, 50),
    data=st.data(),
)
def test_counts_match_plain_python(tmp_path_factory, set_chunk, documents, chunk, data):
    set_chunk(chunk)
    prefix = tmp_path_factory.mktemp("inspect") / "p_text_document"
    with writer(prefix) as out:
        for document in documents:
            out.add(document)
    ids = [token for document in documents for token in document]
    mask = data.draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    mask_path(prefix).write_bytes(bytes(mask))
    found = inspect(Dataset(prefix), ctx_len=6, micro_bsz=2)
    assert (found.documents, found.tokens) == (len(documents), len(ids))
    assert (found.smallest_id, found.largest_id) == (min(ids), max(ids))
    assert found.with_eod == sum(document[-1:] == [0] for document in documents)
    assert found.empty == sum(document in ([], [0]) for document in documents)
    assert found.too_long == sum(len(document) > 7 for document in documents)
    assert found.longest == max(map(len, documents))
    firsts: dict = {}
    duplicates = [[firsts[tuple(d)], n] for n, d in enumerate(documents, 1) if firsts.setdefault(tuple(d), n) != n]
    assert found.repeated == len(duplicates)
    assert all(pair in duplicates for pair in found.repeated_examples)
    assert bool(found.repeated_examples) == bool(duplicates)
    bins = collections.Counter(len(document).bit_length() for document in documents)
    assert found.lengths == [bins[k] for k in range(histogram.BINS)]
    assert found.counted == sum(mask)
    numbers = [i for i, document in enumerate(documents) for _ in document]
    assert found.uncounted_documents == len(documents) - len({n for n, m in zip(numbers, mask, strict=True) if m})
    assert found.contexts == (len(ids) - 1) // 6
    assert found.steps == -(-found.contexts // 2)


def test_vocabulary_guess(tmp_path, write_jsonl, root):
    world = converted(root / "data/example.jsonl", tmp_path / "world")
    assert inspect(Dataset(world), 64, 2).vocabulary == "World"
    # line breaks are 187 in 20B; in World it is a byte that starts no character
    with writer(tmp_path / "neox") as out:
        for i in range(50):
            out.add([1000 + i, 310, 187, 187, 2000 + i, 0])
    assert inspect(Dataset(tmp_path / "neox"), 64, 2).vocabulary == "20B"
    with writer(tmp_path / "other", "int32") as out:
        out.add([1, 70000, 0] * 50)
    found = inspect(Dataset(tmp_path / "other"), 64, 2)
    assert found.vocabulary == "unknown"
    assert "token id 70000 is not in any RWKV vocabulary" in found.problems[0]


def test_valid_file_has_no_problem(tmp_path, root):
    found = inspect(Dataset(converted(root / "data/example.jsonl", tmp_path / "p")), 64, 2, samples=2)
    assert found.problems == []
    assert found.samples[0].startswith("User: ")
    text = format_report(found)
    assert "no problem found" in text
    assert f"--epoch_steps {found.steps}" in text
    assert f"--magic_prime {found.magic_prime}" in text
    assert "█" in text


PROBLEMS = [
    ([[1, 2, 0]] * 5 + [[3, 4]], None, "1 documents do not end with token 0"),
    ([[1, 2, 3, 4, 0]] * 4 + [[0]], None, "1 documents are empty"),
    ([[1, 2, 0]], None, r"3 tokens, but one sample of ctx_len 10 needs 12"),
    ([[1, 2, 3, 0]] * 5, [0] * 20, "no token contributes to the loss"),
    ([[1, 2, 3, 0]] * 5, [2] * 20, "bytes other than 0 and 1"),
]


@pytest.mark.parametrize(("documents", "mask", "message"), PROBLEMS)
def test_problems(tmp_path, documents, mask, message):
    with writer(tmp_path / "p") as out:
        for document in documents:
            out.add(document)
    if mask:
        mask_path(tmp_path / "p").write_bytes(bytes(mask))
    found = inspect(Dataset(tmp_path / "p"), 10, 1)
    assert len([problem for problem in found.problems if message in problem]) == 1, found.problems
    assert f"PROBLEM:    {found.problems[0]}" in format_report(found)


def verified(prefix, source, tokenizer=None, **flags):
    data = Dataset(prefix)
    found = inspect(data, 2, 1, tokenizer=tokenizer)
    verify(data, *texts(ConvertConfig(input=str(source), **flags)), found, tokenizer)
    return found


TEXTS = ["first document", "zweites, mit Ümlaut", "第三"]


@pytest.mark.parametrize("append_eod", [True, False])
def test_verify_decodes_to_source(write_jsonl, tmp_path, append_eod):
    source = write_jsonl(*({"text": text} for text in [*TEXTS, "a\0b"]))
    found = verified(converted(source, tmp_path / "p", append_eod), source)
    assert found.verified == 4


def test_verify_all_input_formats(write_jsonl, tmp_path):
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "zwei 二"}]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("ein Text\nin zwei Zeilen", encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "c"}\n{"text": "d"}\n'))
    parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "c.parquet")
    for source, count in ((folder, 6), (write_jsonl({"messages": chat}, {"conversations": chat}), 2)):
        prefix = converted(source, tmp_path / "p")
        assert verified(prefix, source).verified == count
        for suffix in (".bin", ".idx"):
            Path(f"{prefix}{suffix}").unlink()


def test_verify_with_other_tokenizer(write_jsonl, tmp_path, byte_tokenizer):
    source, vocabulary = write_jsonl({"text": "Hell\n"}, {"text": "e\u0301<|endoftext|>"}), str(byte_tokenizer[0])
    flags = {"tokenizer_type": "HFTokenizer", "vocab_file": vocabulary}
    convert(ConvertConfig(input=str(source), output_prefix=str(tmp_path / "p"), workers=1, **flags))
    found = verified(tmp_path / "p_text_document", source, HFTokenizer(vocabulary), **flags)
    assert (found.verified, found.samples[0]) == (2, "Hell\n<|endoftext|>")
    other = write_jsonl({"text": "Hell\n"}, {"text": "e<|endoftext|>"}, name="other.jsonl")
    found = verified(tmp_path / "p_text_document", other, HFTokenizer(vocabulary), **flags)
    assert "document 2 differs from the source at byte 0" in found.problems[-1]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            [TEXTS[0], "zweites, mit Umlaut", TEXTS[2]],
            "document 2 differs from the source at byte 13: the source has b'Umlaut', the data b'\\xc3\\x9cmlaut'",
        ),
        (TEXTS[:2], "the source has 2 documents, the data 3"),
        ([*TEXTS, "more"], "the source has more documents than the 3 of the data"),
        ([TEXTS[0] + " and more", *TEXTS[1:]], "document 1 differs from the source at byte 14"),
    ],
    ids=["another character", "fewer", "more", "longer"],
)
def test_verify_reports_difference(write_jsonl, tmp_path, others, message):
    prefix = converted(write_jsonl(*({"text": text} for text in TEXTS)), tmp_path / "p")
    found = verified(prefix, write_jsonl(*({"text": text} for text in others), name="other.jsonl"))
    assert found.verified is None
    assert any(message in problem for problem in found.problems), found.problems


def test_inspect_memory_is_constant(tmp_path, root):
    """Ten times the documents and tokens do not raise the peak memory."""
    peaks = []
    for name, count in (("small", 300), ("large", 3000)):
        with writer(tmp_path / name) as out:
            for i in range(count):
                out.add(np.full(10_000, 1 + i % 200))
        program = f"""
from rwkv.data.binidx import Dataset
from rwkv.data import inspection
from rwkv.memory import machine
inspection._CHUNK = 1 << 20
inspection.inspect(Dataset({str(tmp_path / name)!r}), 1024, 12)
print(machine.rss_peak() >> 20)
"""
        result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout))
    assert peaks[1] - peaks[0] < 30, peaks  # MiB; the large file is 54 MiB larger, 9 measured


def test_histogram_png(tmp_path):
    counts = histogram.count(np.array([0, 1, 2, 3, 4, 1000]))
    assert [(histogram.label(k), int(counts[k])) for k in np.flatnonzero(counts)] == [
        ("0", 1),
        ("1", 1),
        ("2–3", 2),
        ("4–7", 1),
        ("512–1,023", 1),
    ]
    lines = histogram.bars(counts).splitlines()
    assert len(lines) == 11
    assert lines[2].endswith("█" * 40)
    for ctx_len in (512, 1 << 62):
        histogram.draw(counts, tmp_path / "x.png", "x", ctx_len)
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "lengths", [[3], [5, 900], [100] * 5000 + [20000], [1] * 3], ids=["one", "two", "many and one", "equal"]
)
@pytest.mark.parametrize("title", ["data", "小说 $x$"])
def test_histogram_labels(tmp_path, monkeypatch, lengths, title):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, image: (drawn.append(figure), figure.savefig(image, dpi=50))[0])
    counts = histogram.count(np.array(lengths))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        histogram.draw(counts, tmp_path / "x.png", title, 4096)
    axes = drawn[0].axes[0]
    shown = {text.get_text() for text in axes.texts} - {""}
    assert shown == {f"{n:,}" for n in counts if n}
    low, high = axes.get_xlim()
    assert low < axes.lines[0].get_xdata()[0] == 12.5 < high  # 2^12 is the left edge of bin 13
    assert drawn[0].legends[0].get_texts()[0].get_text() == "ctx_len 4,096"
    assert axes.get_yscale() == ("log" if len(lengths) > 5000 else "linear")
    bottom, top = axes.get_ylim()
    assert all(bottom < bar.get_height() < top for bar in axes.patches if bar.get_height())
