"""The written files against an independent reader and the reader of rwkv.data.binidx; atomicity."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv.data.binidx import Dataset
from rwkv.data.binidx_writer import writer
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
    with (
        pytest.raises(UserError, match=r"token id -1 does not fit uint16; token ids must be from 0 to 65535"),
        writer(tmp_path / "p") as out,
    ):
        out.add_stream([np.array([1, -1])])
    assert list(tmp_path.iterdir()) == []
