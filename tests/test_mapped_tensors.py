"""Tensors stay memory-mapped: no copy in memory, no writes to the file, the same values for any
file layout.
"""

import os
import subprocess
import sys
import zipfile

import pytest
import safetensors.torch
import torch

from rwkv import checkpoint, mapped_tensors
from rwkv.checkpoint import load_model, read_tensors, save_model
from rwkv.files import sha256
from rwkv.models import RWKV
from rwkv.models.v4 import Sizes

SUFFIXES = [".pth", ".safetensors"]
MEASURE = """
import os, sys, torch
from pathlib import Path
from rwkv.checkpoint import load_model
def peak():
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
def file_rss():
    found, name = 0, None
    for fields in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
        name = fields[-1] if "-" in fields[0] else name
        found += int(fields[1]) << 10 if fields[0] == "Rss:" and name == sys.argv[1] else 0
    return found
for dtype in (torch.float32, torch.bfloat16):
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = peak()
    model = load_model(sys.argv[1], dtype=dtype)
    print(peak() - before)
    if dtype == torch.float32:
        with open(sys.argv[1]) as file:  # Linux maps up to half a MiB at a time of a file in the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with torch.no_grad():
            model(torch.arange(0, 32768, 512)[None])
        print(file_rss())
    del model
"""


@pytest.fixture(scope="module", params=SUFFIXES)
def large(request, tmp_path_factory):
    """A checkpoint of 190 MB: its path, the bytes of all weights and of the embedding."""
    model = RWKV(Sizes(4, 512, 32768, 512, 2048))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    path = tmp_path_factory.mktemp("large") / f"base{request.param}"
    save_model(path, model, {})
    # drop it from the page cache: Linux maps up to half a MiB of a cached file at a time
    with open(path) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    yield path, sum(4 * parameter.numel() for parameter in model.parameters()), 4 * model.emb.weight.numel()
    path.unlink()


def test_loading_makes_no_copy(large, root):
    path, total, largest = large
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # threads have stacks, and there may be many
    command = [sys.executable, "-c", MEASURE, path]
    found = subprocess.run(command, cwd=root, env=one_thread, capture_output=True, text=True, check=True)
    mapped_only, used, converted = map(int, found.stdout.split())
    overhead = 40 << 20  # imported code, and activations of 64 tokens: 14 MB measured
    assert mapped_only < overhead  # pages read by the check for NaN are released
    # of the embedding only the rows in use and readahead
    assert total - largest < used < total
    # bf16 is half of the fp32 total, plus the tensor being converted; the pages of the others are
    # released
    assert converted < total / 2 + largest + overhead


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_training_does_not_modify_file(tmp_path, make_model, suffix):
    path = tmp_path / f"base{suffix}"
    save_model(path, make_model(), {})
    before, model = sha256(path), load_model(path)
    pages = mapped_tensors.Pages(path)
    assert all(pages.contains(parameter) for parameter in model.parameters())
    adam, tokens = torch.optim.Adam(model.parameters(), lr=0.1), torch.arange(20)[None]
    for _ in range(2):
        model(tokens)[0].logsumexp(-1).sum().backward()
        adam.step()
    assert sha256(path) == before
    stored = read_tensors(path)
    assert all(
        not torch.equal(parameter, stored[name])
        for name, parameter in model.named_parameters()
        if parameter.grad.abs().sum() > 0
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_save_over_mapped_file(tmp_path, make_model, suffix):
    path, tokens = tmp_path / f"base{suffix}", torch.arange(20)[None]
    save_model(path, make_model(), {})
    before, model = path.read_bytes(), load_model(path)
    save_model(path, model, {})
    assert path.read_bytes() == before
    expected = model(tokens)[0]
    save_model(path, make_model(seed=1), {})
    assert path.read_bytes() != before
    assert torch.equal(model(tokens)[0], expected)


def repack(source, target, **options):
    """A zip archive repacked without torch's alignment."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))


def other_forms(folder, tensors):
    """The same tensors in files of current torch, of torch before 1.6, and repacked by other
    programs.
    """
    torch.save(tensors, folder / "current.pth")
    torch.save(tensors, folder / "old.pth", _use_new_zipfile_serialization=False)
    repack(folder / "current.pth", folder / "unaligned.pth")
    repack(folder / "current.pth", folder / "compressed.pth", compression=zipfile.ZIP_DEFLATED)
    safetensors.torch.save_file(tensors, folder / "current.safetensors")
    header = (folder / "current.safetensors").read_bytes()
    # blanks may follow the header, so that tensors begin at any address
    size = int.from_bytes(header[:8], "little") + 3
    (folder / "unaligned.safetensors").write_bytes(
        size.to_bytes(8, "little") + header[8 : 5 + size] + b"   " + header[5 + size :]
    )
    return [
        folder / name
        for name in (
            "current.pth",
            "old.pth",
            "unaligned.pth",
            "compressed.pth",
            "current.safetensors",
            "unaligned.safetensors",
        )
    ]


def test_values_independent_of_alignment(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.tensor(2.0),
        "d": torch.empty(0, 4),
        "e": torch.randn(9).double(),
    }
    for path in other_forms(tmp_path, tensors):
        found = read_tensors(path)
        assert found.keys() == tensors.keys(), path
        assert all(
            torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in tensors.items()
        ), path
        assert all(value.data_ptr() % value.element_size() == 0 for value in found.values()), path


def test_shared_storage_trains_separately(tmp_path, make_model):
    tensors = {name: parameter.detach() for name, parameter in make_model().named_parameters()}
    tensors["head.weight"] = tensors["emb.weight"]
    torch.save(tensors, tmp_path / "tied.pth")
    model = load_model(tmp_path / "tied.pth")
    assert torch.equal(model.head.weight, model.emb.weight)
    with torch.no_grad():
        model.head.weight.add_(1)
    assert torch.equal(model.emb.weight, tensors["emb.weight"])


def test_view_saved_without_its_base(tmp_path, make_model):
    tensors = {name: parameter.detach() for name, parameter in make_model().named_parameters()}
    big = torch.randn(1000, 16)
    tensors["emb.weight"], tensors["head.weight"] = big[:50], torch.randn(16, 50).t()
    torch.save(tensors, tmp_path / "views.pth")
    model = load_model(tmp_path / "views.pth")
    save_model(tmp_path / "copy.pth", model, {})
    assert all(
        torch.equal(value, tensors[name]) for name, value in checkpoint.read_tensors(tmp_path / "copy.pth").items()
    )
    assert (tmp_path / "copy.pth").stat().st_size < (tmp_path / "views.pth").stat().st_size - 900 * 16 * 4
