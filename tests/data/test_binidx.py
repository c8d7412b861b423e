"""Reading binidx files, and errors for invalid ones; tests/data/test_binidx_writer.py compares them
with an independent reader.
"""

import numpy as np
import pytest

from rwkv.data import binidx
from rwkv.data.binidx import Dataset
from rwkv.data.binidx_writer import writer
from rwkv.errors import UserError


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


@pytest.mark.parametrize("prefix", ["/", ".", "..", "", ".idx"])
def test_prefix_without_name(prefix):
    with pytest.raises(UserError, match="not the prefix of a binidx"):
        Dataset(prefix)


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
