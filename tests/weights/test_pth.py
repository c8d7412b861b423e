"""Reading a file never executes code from it, on any torch version (CVE-2025-32434,
GHSA-53q9-r3pm-6pq6).
"""

import contextlib
import os
import pickle
import struct
import time
import warnings
import zipfile
from pathlib import Path

import hostile
import pytest
import torch

from rwkv import adapter_files, checkpoint
from rwkv.errors import FileFormatError, UserError
from rwkv.train.resume import state_files
from rwkv.weights import pth

READERS = {
    "pth": pth.load,
    "model": checkpoint.load_model,
    "tensors": checkpoint.read_tensors,
    "adapter": adapter_files.inspect_adapter,
    "state": state_files.read,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, where executed code would leave its marker."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victim").write_text("untouched")
    os.chmod(tmp_path / "victim", 0o600)
    return tmp_path


def assert_rejected(path: Path, read=pth.load) -> str:
    """Assert that a file is rejected and nothing is executed; returns the error message."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError if read is state_files.read else (FileFormatError, UserError)
        ) as error:  # states have another error class
            read(path)
    assert not Path(hostile.MARKER).exists(), path
    assert "weights_only" not in str(error.value)
    return str(error.value)


def written(data: bytes) -> Path:
    Path("x.pth").write_bytes(data)
    return Path("x.pth")


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_torchscript_rejected(folder, read):
    for path in hostile.scripts(folder):
        assert_rejected(path, read)


def test_hostile_torchscript_would_run(folder):
    torch.jit.load(str(hostile.scripts(folder)[0]))
    assert Path(hostile.MARKER).exists()


@pytest.mark.parametrize("name", hostile.CALLS)
def test_forbidden_names_not_called(name):
    for protocol in (2, 4):
        pickled = hostile.call(name, hostile.CALLS[name], protocol)
        for data in (hostile.archive(pickled), pickled, *(hostile.legacy(pickled, place) for place in range(5))):
            assert_rejected(written(data))


@pytest.mark.parametrize("name", hostile.other_instructions())
def test_forbidden_opcodes_not_executed(name):
    pickled = hostile.other_instructions()[name]
    for data in (hostile.archive(pickled), pickled, *(hostile.legacy(pickled, place) for place in range(5))):
        assert_rejected(written(data))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_calls_rejected_by_every_reader(read):
    pickled = hostile.dictionary("emb.weight", hostile.call("os system", hostile.CALLS["os system"])[2:-1])
    for data in (hostile.archive(pickled), hostile.legacy(pickled, 3)):
        assert_rejected(written(data), read)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_irregular_file_not_opened(folder, read):
    assert "pipe" in assert_rejected(hostile.fifo(folder), read)
    (folder / "link").symlink_to("pipe.pth")
    assert "pipe" in assert_rejected(folder / "link", read)
    assert "device" in assert_rejected(Path("/dev/zero"), read)
    assert_rejected(folder, read)
    assert "no such" in assert_rejected(folder / "none.pth", read).lower()
    assert_rejected(Path("a" * 300), read)
    assert_rejected(Path("a\0b"), read)


def test_tar_not_unpacked(folder):
    before = os.stat("victim")
    assert_rejected(hostile.tar(folder))
    assert os.stat("victim") == before
    assert Path("victim").read_text() == "untouched"


def test_permission_denied(folder, monkeypatch):
    torch.save({}, "x.pth")

    def denied(*arguments, **keywords):
        raise PermissionError(13, "Permission denied", "x.pth")

    monkeypatch.setattr(os, "open", denied)  # root may read everything
    assert "no permission to read" in assert_rejected(Path("x.pth"))


def test_plain_data_and_tensors_roundtrip():
    value = {
        "tensors": [
            torch.randn(3, 4),
            torch.randn(4, 3).t(),
            torch.arange(3),
            torch.tensor(True),
            torch.empty(0, 3),
            torch.tensor(2.5).double(),
        ],
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "numbers": (1, -1, 1 << 40, -(1 << 70), 1.5, float("inf"), True, None),
        "text": "é" * 300,
        "bytes": [b"a" * 300, b""],
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        3: {"inside": []},
    }
    linear = torch.nn.Linear(2, 3)
    linear.weight.note = "an attribute of a parameter"
    value["module"] = linear.state_dict()  # an OrderedDict with attributes
    value["weight"] = linear.weight
    for protocol in (2, 3, 4, 5):
        for form in (True, False):
            torch.save(value, "x.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=form)
            found = pth.load("x.pth", verify=True)
            assert found.keys() == value.keys()
            for ours, theirs in zip(found["tensors"], value["tensors"], strict=True):
                assert ours.dtype == theirs.dtype
                assert torch.equal(ours, theirs)
            assert torch.equal(found["weight"], linear.weight)
            assert torch.equal(found["module"]["bias"], linear.bias)
            plain = ("numbers", "text", "dtype", 3)
            assert [found[key] for key in plain] == [value[key] for key in plain]
            assert tuple(found["size"]) == (2, 3)


def test_verify_checksums():
    torch.save({"a": torch.zeros(1000)}, "x.pth")
    data = bytearray(Path("x.pth").read_bytes())
    with zipfile.ZipFile("x.pth") as file:
        place = next(x for x in file.infolist() if x.filename.endswith("data/0")).header_offset + 500
    data[place] ^= 1
    pth.load(written(data))
    with pytest.raises(FileFormatError, match="checksum"):
        pth.load("x.pth", verify=True)


TENSORS = {
    "expanded": (hostile.tensor((1 << 20, 1 << 20), (0, 0), 4), "has 1,099,511,627,776 elements"),
    "larger than its storage": (hostile.tensor((5,), (1,), 4), "does not fit into its storage"),
    "strided beyond its storage": (hostile.tensor((2, 2), (3, 1), 4), "does not fit into its storage"),
    "a product beyond 64 bits": (hostile.tensor((1 << 40, 1 << 40), (0, 0), 4), "invalid shape"),
    "negative": (hostile.tensor((-1,), (1,), 4), "invalid shape"),
    "negative stride": (hostile.tensor((2,), (-1,), 4), "invalid stride"),
    "a Boolean as its size": (hostile.tensor((True,), (1,), 4), "invalid shape"),
    "fewer strides": (hostile.tensor((2, 2), (1,), 4), "more strides than dimensions, or fewer"),
    "a storage of another size": (hostile.tensor((3,), (1,), 5), "has 16 bytes, but its tensors need 20"),
    "a huge storage": (hostile.tensor((3,), (1,), 1 << 50), "has 16 bytes, but its tensors need"),
    "complex": (hostile.tensor((2,), (1,), 2, "ComplexFloatStorage"), "bad.key is complex64"),
    "a quantised storage": (hostile.tensor((4,), (1,), 16, "QInt8Storage"), "bad.key is qint8"),
    "quantised": (hostile.tensor((4,), (1,), 16, "QInt8Storage", "_rebuild_qtensor"), "bad.key is quantised"),
    "meta": (b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R", "bad.key is on the meta device"),
    "sparse": (b"ctorch._utils\n_rebuild_sparse_tensor\n)R", "bad.key is sparse"),
    "float8": (
        hostile.tensor((4,), (1,), 16, "UntypedStorage", "_rebuild_tensor_v3", b"ctorch\nfloat8_e4m3fn\n"),
        "bad.key is float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_outside_file(name):
    pushed, message = TENSORS[name]
    assert message in assert_rejected(
        written(hostile.archive(hostile.dictionary("bad.key", pushed), {"data/0": b"\0" * 16}))
    )


def test_recursive_containers():
    begin = time.process_time()
    # a list of ten times itself
    pth.load(written(hostile.archive(b"\x80\x02]q\x00(" + b"h\x00" * 10 + b"e.")))
    levels = [
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(40)
    ]  # each contains the previous one twice
    pth.load(written(hostile.archive(b"\x80\x02]q\x000" + b"0".join(levels) + b".")))
    assert_rejected(written(hostile.archive(b"\x80\x02]" + b"\x85" * 100_000 + b".")))
    # as a key of a dictionary
    assert_rejected(written(hostile.archive(b"\x80\x02}]" + b"\x85" * 100_000 + b"Ns.")))
    # a tenth of a second; following each reference takes 10^11 visits
    assert time.process_time() - begin < 60


def test_decompression_is_bounded():
    pickled = hostile.dictionary("a", hostile.tensor((1 << 26,), (1,), 1 << 26))
    with zipfile.ZipFile("x.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickled)
        with file.open("archive/data/0", "w") as record:
            for _ in range(256):
                record.write(bytes(1 << 20))
    assert "too many for a file of" in assert_rejected(Path("x.pth"))


def test_archive_layout_enforced():
    torch.save({"a": torch.zeros(8)}, "good.pth")
    data = Path("good.pth").read_bytes()
    with zipfile.ZipFile("good.pth") as file:
        records = {record.filename: file.read(record) for record in file.infolist()}
    end, directory = data.rfind(b"PK\x05\x06"), data.find(b"PK\x01\x02")
    for name, content in {
        "prefixed": b"#" + data,
        "followed": data + b"#",
        "encrypted": data[: directory + 8] + struct.pack("<H", 0x801) + data[directory + 10 :],
        "another name": data.replace(b"good/data.pkl", b"good/data.pkm", 1),
        "a larger count": data[: end + 8] + struct.pack("<2H", 9, 9) + data[end + 12 :],
        "a moved directory": data[: end + 16] + struct.pack("<I", 0) + data[end + 20 :],
        "another disk": data[: end + 4] + struct.pack("<H", 1) + data[end + 6 :],
    }.items():
        Path("x.pth").write_bytes(content)
        assert assert_rejected(Path("x.pth")), name
    for strange in (
        "good/code/__torch__.py",
        "good/constants.pkl",
        "good/x",
        "other/data/1",
        "../x",
        "good/data/../../x",
    ):
        with zipfile.ZipFile("x.pth", "w") as file:
            for name, content in {**records, strange: b""}.items():
                file.writestr(name, content)
        assert_rejected(Path("x.pth"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile, about the duplicate name
        with zipfile.ZipFile("x.pth", "w") as file:
            for name, content in [*records.items(), *records.items()]:
                file.writestr(name, content)
    assert "two records with the same name" in assert_rejected(Path("x.pth"))


def test_truncated_file_message():
    torch.save({"a": torch.zeros(1000)}, "x.pth")
    data = Path("x.pth").read_bytes()
    assert "it has 3,000 bytes, but its tensors alone need 4,000" in assert_rejected(written(data[:3000]))
    assert "it is truncated, or followed by other bytes" in assert_rejected(written(data[:-10]))
    assert "it is truncated, or followed by other bytes" in assert_rejected(written(data + bytes(70_000)))
    torch.save({"a": torch.zeros(1000)}, "x.pth", _use_new_zipfile_serialization=False)
    data = Path("x.pth").read_bytes()
    assert f"it has 3,000 bytes of {len(data):,}" in assert_rejected(written(data[:3000]))
    for form in (True, False):
        torch.save({"a": torch.zeros(10), "b": {"c": 1}}, "x.pth", _use_new_zipfile_serialization=form)
        data = Path("x.pth").read_bytes()
        for size in range(len(data)):
            assert_rejected(written(data[:size]))


def test_fuzzed_files_never_crash():
    torch.save({"a": torch.zeros(2, 2), "b": [1.5, "x", torch.ones(3).bfloat16()]}, "x.pth")
    data = Path("x.pth").read_bytes()
    torch.save({"a": torch.zeros(2, 2), "b": [1.5, "x"]}, "x.pth", _use_new_zipfile_serialization=False)
    for good in (data, Path("x.pth").read_bytes()):
        for place in range(len(good)):
            for flip in (0x01, 0x80, 0xFF):
                bad = bytearray(good)
                bad[place] ^= flip
                with contextlib.suppress(FileFormatError):
                    pth.load(written(bytes(bad)))


def test_foreign_pickle():
    for value in ({"a": 1}, [], 0x1950A86A20F9469CFC6C):
        assert_rejected(written(pickle.dumps(value, 2)))
