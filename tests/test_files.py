"""Files appear whole or not at all."""

import hashlib
import json

import pytest

from rwkv.files import sha256, whole, write_json


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "f"
    path.write_text("old")

    def fail():
        with whole(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_permissions_are_ordinary(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"键": 1})
    path = tmp_path / "a" / "b.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {"键": 1}
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_sha256_is_that_of_the_bytes(tmp_path):
    data = b"x" * (5 << 20)
    (tmp_path / "f").write_bytes(data)
    assert sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()
