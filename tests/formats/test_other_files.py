"""Files for PyPI's rwkv, web-rwkv and rwkv.cpp, of a base with its adapter merged."""

import json
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from rwkv import checkpoint, export
from rwkv.adapter_files import load_tuned
from rwkv.config import ExportConfig
from rwkv.errors import FileFormatError, UserError
from rwkv.formats import rwkv_cpp, web_rwkv
from tests.formats.oracle import ask, script_main
from tests.formats.test_peft import adapter_of
from tests.oracle import needs_oracle

IDS = list(range(1, 30))
# torch 1.13's load has no mmap
PYPI_RWKV = """
import json, os, sys, torch
files, ids, v7 = map(json.loads, sys.argv[2:])
os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": v7}
load = torch.load
torch.load = lambda *a, mmap=None, **k: load(*a, **k)
sys.path.insert(0, sys.argv[1])
from rwkv.model import RWKV
found = [RWKV(file, "cpu fp32").forward(list(ids), None, full_output=True)[0] for file in files]
print()
print(json.dumps([[row.tolist() for row in logits] for logits in found]))
"""
VERSIONS = ["4", "5.2", "6", "7"]


@pytest.fixture(scope="module")
def tuned(model_file, tmp_path_factory):
    """A trained base in bf16, its adapter, and their logits."""
    folder, made = tmp_path_factory.mktemp("tuned"), {}

    def make(version):
        if version not in made:
            base = model_file(version, True, torch.bfloat16)
            adapter = adapter_of(base, folder / f"{version}.pth", ("att", "ffn", "time"))
            with torch.no_grad():
                made[version] = base, adapter, load_tuned(base, adapter)[0](torch.tensor([IDS]))[0][0]
        return made[version]

    return make


def exported(tuned, version, output, **options):
    base, adapter, logits = tuned(version)
    script_main()(ExportConfig(model=str(base), lora=str(adapter), output=str(output), check_tokens=8, **options))
    return logits


@needs_oracle
@pytest.mark.parametrize("versions", [VERSIONS[:3], VERSIONS[3:]], ids=str)
def test_pypi_rwkv_gives_our_logits(tuned, tmp_path, versions):
    files, expected = [], []
    for version in versions:
        for dtype in ("bf16", "fp16"):
            files.append(str(tmp_path / f"{version}-{dtype}"))
            logits = exported(tuned, version, files[-1] + ".pth", dtype=dtype)
            written = checkpoint.load_model(files[-1] + ".pth")
            with torch.no_grad():
                expected.append(written(torch.tensor([IDS]))[0][0])
            assert float((expected[-1] - logits).abs().max()) < 0.5  # rounding; the logits are up to 20
            assert float((expected[-1] - logits).abs().max()) > 0
            if version != "7":
                expected[-1] = with_their_embedding(written, files[-1] + ".pth")
    for theirs, ours in zip(ask(PYPI_RWKV, files, IDS, str(int(versions == ["7"]))), expected, strict=True):
        torch.testing.assert_close(torch.tensor(theirs), ours, rtol=1e-4, atol=1e-3)  # fp32, other order of sums


def with_their_embedding(model, path):
    """Our logits with the embedding normalised in the file's dtype, as PyPI's rwkv does up to
    RWKV-6.
    """
    tensors = checkpoint.read_tensors(path)
    embedding, *norm = (tensors[name] for name in ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias"))
    try:
        embedding = F.layer_norm(embedding, norm[0].shape, *norm)
    except RuntimeError:  # torch 1.13.1 has no fp16 for it on CPUs; they then use fp32
        embedding = F.layer_norm(embedding.float(), norm[0].shape, *(tensor.float() for tensor in norm))
    with torch.no_grad():
        model.emb.weight.copy_(embedding)
        model.blocks[0].ln0 = torch.nn.Identity()
        return model(torch.tensor([IDS]))[0][0]


@pytest.mark.parametrize("version", VERSIONS)
def test_web_rwkv(tuned, tmp_path, version):
    exported(tuned, version, tmp_path / "x.st")
    source = export.open_source(*tuned(version)[:2])
    written = safetensors.torch.load_file(tmp_path / "x.st")
    expected = {name: lazy.make().half() for name, lazy in source.tensors.items()}
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    assert all(name == name.lower() and "time_maa" not in name and "faaaa" not in name for name in written)
    att = "blocks.1.att."
    pairs = {
        "4": {"time_first": "time_first", "time_mix_k": "time_mix_k"},
        "5.2": {"time_first": "time_faaaa", "time_mix_g": "time_mix_g", "time_decay": "time_decay"},
        "6": {"time_first": "time_faaaa", "time_mix_x": "time_maa_x", "time_mix_w": "time_maa_w"},
        "7": {"x_r": "x_r", "w0": "w0", "r_k": "r_k"},
    }[version]
    for theirs, ours in pairs.items():
        assert torch.equal(written[att + theirs], expected[att + ours])
    transposed = {
        "6": {"time_mix_w1": "time_maa_w1", "time_mix_w2": "time_maa_w2", "time_decay_w1": "time_decay_w1"},
        "7": {name: name for name in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")},
    }.get(version, {})
    for theirs, ours in transposed.items():
        assert torch.equal(written[att + theirs], expected[att + ours].transpose(-2, -1))
    back = web_rwkv.restore(written)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


def plain_reader(path):
    """A second reader of rwkv.cpp's files, from its description of the format."""
    data, at, found = path.read_bytes(), 24, {}
    head = struct.unpack("=6i", data[:24])
    while at < len(data):
        dims, length, kind = struct.unpack_from("=3i", data, at)
        shape = struct.unpack_from(f"={dims}i", data, at + 12)[::-1]
        name = data[at + 12 + 4 * dims :][:length].decode()
        at += 12 + 4 * dims + length
        dtype = np.dtype(["<f4", "<f2"][kind])
        count = int(np.prod(shape))
        found[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
    return head, found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_rwkv_cpp(tuned, tmp_path, version, dtype):
    exported(tuned, version, tmp_path / "x.bin", dtype=dtype)
    source = export.open_source(*tuned(version)[:2])
    ours = {name: lazy.make().float() for name, lazy in source.tensors.items()}
    head, found = plain_reader(tmp_path / "x.bin")
    assert head == (0x67676D66, 101, 300, 128, 2, int(dtype == "fp16"))
    matrix = torch.float16 if dtype == "fp16" else torch.float32
    expected = {"emb.weight": ours["emb.weight"].to(matrix), "ln_out.bias": ours["ln_out.bias"]}
    a = "blocks.1.att."
    if version == "7":
        expected[a + "x_rwkvag"] = torch.cat([ours[f"{a}x_{letter}"] for letter in "rwkvag"])
        expected |= {a + n: ours[a + n].t().to(matrix) for n in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")}
        expected |= {a + n: ours[a + n] for n in ("w0", "k_k", "r_k")}
    elif version == "6":
        expected |= {a + n: ours[a + n].t() for n in ("time_maa_w1", "time_decay_w1", "time_decay_w2")}
        expected[a + "time_maa_w2"] = ours[a + "time_maa_w2"].transpose(1, 2)
        expected[a + "time_faaaa"] = ours[a + "time_faaaa"].unsqueeze(-1)
        expected[a + "time_decay"] = ours[a + "time_decay"].reshape(2, 64, 1)
        expected[a + "time_maa_x"] = ours[a + "time_maa_x"].reshape(-1)
    elif version == "5.2":
        expected[a + "time_decay"] = torch.exp(-torch.exp(ours[a + "time_decay"])).unsqueeze(-1)
        expected[a + "time_faaaa"] = ours[a + "time_faaaa"].unsqueeze(-1)
    else:
        expected[a + "time_decay"] = -torch.exp(ours[a + "time_decay"])
        expected[a + "time_mix_k"] = ours[a + "time_mix_k"].reshape(-1)
    for name, tensor in expected.items():
        assert found[name].dtype == {torch.float16: np.float16, torch.float32: np.float32}[tensor.dtype], name
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
    assert len(found) == len(ours) - (5 * 2 if version == "7" else 0)


def test_corrupt_rwkv_cpp_file(tmp_path):
    for content in (b"", b"x" * 30, struct.pack("=6i", 0x67676D66, 101, 1, 1, 1, 0) + bytes(20)):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(FileFormatError):
            rwkv_cpp.read(tmp_path / "x.bin")


@pytest.mark.parametrize(("name", "dtype"), [("x.st", "bf16"), ("x.bin", "bf16"), ("x.pth", "q8_0"), ("hf", "q8_0")])
def test_dtypes_that_a_format_cannot_hold(model_file, tmp_path, name, dtype):
    with pytest.raises(UserError, match=rf"--dtype {dtype}: .* cannot hold it; use fp"):
        script_main()(ExportConfig(model=str(model_file("4")), output=str(tmp_path / name), dtype=dtype))
    assert not (tmp_path / name).exists()


def test_manifest_names_model_and_adapter(tuned, tmp_path):
    exported(tuned, "7", tmp_path / "x.safetensors")
    manifest = checkpoint.read_manifest(tmp_path / "x.safetensors")
    assert (manifest["kind"], manifest["version"]) == ("model", "7")
    assert (tmp_path / manifest["adapter"]).samefile(tuned("7")[1])
    assert str(tmp_path) not in json.dumps(manifest)
