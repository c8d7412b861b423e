"""Our safetensors writer: the library's bytes, written into an open, locked file."""

import fcntl
import os
import resource
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from rwkv import checkpoint
from rwkv.errors import UserError
from rwkv.files import atomic_write, stale_temporaries
from rwkv.weights import safetensors_file

TENSORS = {
    "b": torch.randn(3, 5),
    "a": torch.randn(7).bfloat16(),
    "é": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "double": torch.randn(2).double(),
    "half": torch.randn(3, 1).half(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
}


def test_bytes_match_library(tmp_path):
    (tmp_path / "x").touch()
    safetensors_file.save(TENSORS, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == safetensors.torch.save(TENSORS, metadata={"format": "pt"})


def test_temporary_file_stays_locked(tmp_path):
    path = tmp_path / "x.safetensors"
    with atomic_write(path) as temporary:
        before = os.stat(temporary).st_ino
        safetensors_file.save(TENSORS, temporary)
        assert os.stat(temporary).st_ino == before
        with open(temporary, "rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not stale_temporaries(path)  # no other writer may delete it
    assert safetensors.torch.load_file(path).keys() == TENSORS.keys()


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_disk_full_keeps_old_file(tmp_path, make_model, ending, root):
    path = tmp_path / f"x{ending}"
    checkpoint.save_model(path, make_model(), {})
    before = path.read_bytes()
    program = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from rwkv import checkpoint
model = checkpoint.load_model({str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, {resource.RLIM_INFINITY}))
try:
    checkpoint.save_model({str(path)!r}, model, {{}})
except checkpoint.UserError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert "the file exceeds the maximum file size" in result.stdout
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["x.gguf", "x.onnx", "x.safetensor", "x.PTH", "x.zip"])
def test_misleading_suffix(name):
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.check_output(name)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x", "rwkv-v1.5", "out.d/x"])
def test_accepted_suffixes(name):
    assert str(checkpoint.check_output(name)) == name
