"""The binidx format against an independent reader, and errors for invalid files."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv.data import binidx
from rwkv.data.binidx import Dataset, writer
from rwkv.errors import UserError


def independent_read(prefix):
    """Parse both files with struct alone, following the format's description, and check every
    field.
    """
    raw, data = (prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".idx", ".bin"))
    assert raw[:9] == b"MMIDIDX\0\0"
    version, code, n_sizes, n_docs = struct.unpack_from("<QBQQ", raw, 9)
    letter, width = {8: ("H", 2), 4: ("i", 4)}[code]
    assert version == 1
    assert n_docs == n_sizes + 1
    assert len(raw) == 34 + 12 * n_sizes + 8 * n_docs
    sizes = struct.unpack_from(f"<{n_sizes}i", raw, 34)
    pointers = struct.unpack_from(f"<{n_sizes}q", raw, 34 + 4 * n_sizes)
    assert struct.unpack_from(f"<{n_docs}q", raw, 34 + 12 * n_sizes) == tuple(range(n_docs))
    documents = [
        list(struct.unpack_from(f"<{size}{letter}", data, at)) for size, at in zip(sizes, pointers, strict=True)
    ]
    assert sum(sizes) * width == len(data)
    return documents


@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1),
    dtype=st.sampled_from(["uint16", "int32"]),
)
def test_roundtrip_with_independent_reader(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("binidx") / "p"
    with writer(prefix, dtype) as out:
        for document in documents:
            out.add(document)
    assert independent_read(prefix) == documents
    if any(documents):
        ours = Dataset(prefix)
        assert [ours.document(i).tolist() for i in range(len(ours))] == documents
        assert ours.tokens.dtype == dtype
        ids = [i for document in documents for i in document]
        assert ours.id_range() == (min(ids), max(ids))
        starts = np.cumsum([0, *map(len, documents[:-1])])
        assert ours.starts(1, len(ids)).tolist() == [start for start in starts if 1 <= start < len(ids)]
    else:
        with pytest.raises(UserError, match="contains no tokens"):
            Dataset(prefix)


def test_file_bytes(tmp_path):
    with writer(tmp_path / "p") as out:
        out.add([1, 2])
        out.add([65535])
    assert (tmp_path / "p.bin").read_bytes().hex() == "01000200ffff"
    expected = (
        "4d4d49444944580000"
        + "0100000000000000"
        + "08"
        + "0200000000000000"
        + "0300000000000000"
        + "02000000"
        + "01000000"
    )
    expected += "0000000000000000" + "0400000000000000" + "0000000000000000" + "0100000000000000" + "0200000000000000"
    assert (tmp_path / "p.idx").read_bytes().hex() == expected


def test_failed_write_keeps_old_files(tmp_path):
    with writer(tmp_path / "p") as out:
        out.add([1, 2, 3])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail():
        with writer(tmp_path / "p") as out:
            out.add([4])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_id_out_of_range(tmp_path):
    with (
        pytest.raises(UserError, match=r"document 1: token id 65536 does not fit uint16"),
        writer(tmp_path / "p") as out,
    ):
        out.add([1, 65536])
    assert list(tmp_path.iterdir()) == []


def test_open_with_or_without_suffix(tmp_path):
    with writer(tmp_path / "p") as out:
        out.add([1])
    for suffix in ("", ".bin", ".idx"):
        assert len(Dataset(f"{tmp_path / 'p'}{suffix}").tokens) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bin, idx: idx.unlink(), r"p.idx: no such file"),
        (lambda bin, idx: bin.unlink(), r"p.bin: no such file"),
        (lambda bin, idx: idx.write_bytes(b"TNTIDX\0\0" + idx.read_bytes()), r"does not begin with MMIDIDX"),
        (lambda bin, idx: idx.write_bytes(idx.read_bytes()[:20]), r"truncated inside its header"),
        (lambda bin, idx: idx.write_bytes(idx.read_bytes()[:-1]), r"2 documents need 82"),
        (lambda bin, idx: bin.write_bytes(bin.read_bytes()[:-1]), r"its index describes 3 tokens of 2 bytes \(6\)"),
        (
            lambda bin, idx: idx.write_bytes(idx.read_bytes()[:9] + b"\2" + idx.read_bytes()[10:]),
            r"version 2 with dtype code 8",
        ),
        (
            lambda bin, idx: idx.write_bytes(idx.read_bytes()[:17] + b"\7" + idx.read_bytes()[18:]),
            r"version 1 with dtype code 7",
        ),
        (
            lambda bin, idx: idx.write_bytes(idx.read_bytes()[:42] + b"\2" + idx.read_bytes()[43:]),
            r"document 1 has size 2 and pointer 2, expected 0",
        ),
        (
            lambda bin, idx: idx.write_bytes(idx.read_bytes()[:37] + b"\xff" + idx.read_bytes()[38:]),
            r"pointers do not match .* size -",
        ),
        (
            lambda bin, idx: idx.write_bytes(idx.read_bytes()[:17] + b"\4" + idx.read_bytes()[18:]),
            r"pointers do not match",
        ),
        (
            lambda bin, idx: idx.write_bytes(idx.read_bytes()[:-8] + b"\1" + idx.read_bytes()[-7:]),
            r"document index is not 0 … 2",
        ),
        (lambda bin, idx: bin.write_bytes(bin.read_bytes() + b"\0\0"), r"8 bytes, but its index describes 3 tokens"),
    ],
)
def test_corrupt_file_error(tmp_path, damage, message):
    with writer(tmp_path / "p") as out:
        out.add([1, 2])
        out.add([3])
    damage(tmp_path / "p.bin", tmp_path / "p.idx")
    with pytest.raises(UserError, match=message):
        Dataset(tmp_path / "p")


def test_mask_is_not_a_file(tmp_path):
    with writer(tmp_path / "p") as out:
        out.add([1, 2, 3])
    (tmp_path / "p_mask.bin").symlink_to("moved")
    with pytest.raises(UserError, match=r"p_mask.bin: not a file, or a link to a file that does not exist"):
        Dataset(tmp_path / "p")


@pytest.mark.parametrize(("prefix", "name"), [("p_text_document", "p_text_mask.bin"), ("p", "p_mask.bin")])
def test_mask_length(tmp_path, prefix, name):
    with writer(tmp_path / prefix, "int32") as out:
        out.add([1, 2, 3])
    assert Dataset(tmp_path / prefix).mask is None
    (tmp_path / name).write_bytes(b"\0\1\1")
    assert Dataset(tmp_path / prefix).mask.tolist() == [0, 1, 1]
    (tmp_path / name).write_bytes(b"\0\1")
    with pytest.raises(
        UserError, match=rf"{name}: 2 bytes, but .*{prefix}.bin has 3 tokens.*convert again, or remove the mask"
    ):
        Dataset(tmp_path / prefix)


def test_index_checked_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(binidx, "_CHUNK", 4)
    with writer(tmp_path / "p") as out:
        for i in range(11):
            out.add([i] * (i % 3))
    assert [Dataset(tmp_path / "p").document(i).tolist() for i in range(11)] == [[i] * (i % 3) for i in range(11)]
    raw = bytearray((tmp_path / "p.idx").read_bytes())
    # the size of document 10, so that the next pointer is the first that does not fit
    raw[34 + 4 * 9] ^= 1
    (tmp_path / "p.idx").write_bytes(raw)
    with pytest.raises(UserError, match="document 11 has size 1 and pointer 18, expected 20"):
        Dataset(tmp_path / "p")


def test_tokens_are_memory_mapped(tmp_path):
    with writer(tmp_path / "p") as out:
        out.add([1, 2])
    assert isinstance(Dataset(tmp_path / "p").tokens, np.memmap)
