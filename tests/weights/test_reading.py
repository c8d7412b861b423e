"""Files given by mistake are identified by content, and the error says what to do."""

import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch

from rwkv import checkpoint
from rwkv.adapter_files import inspect_adapter
from rwkv.checkpoint import load_model, read_tensors
from rwkv.config import LoRAConfig
from rwkv.errors import UserError
from rwkv.train.setup import sizes_of


def block(**shapes) -> dict[str, torch.Tensor]:
    """The tensors of one block and an embedding."""
    named = {"emb.weight": (50, 16), **{f"blocks.0.{name.replace('__', '.')}": shape for name, shape in shapes.items()}}
    return {name: torch.zeros(shape) for name, shape in named.items()}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 3063070000\n"
CONTENTS = {
    "git-lfs": (LFS, r"a git-lfs pointer of \d+ bytes.*3,063,070,000 bytes.*git lfs pull"),
    "git-lfs with CRLF and a BOM": (b"\xef\xbb\xbf" + LFS.replace(b"\n", b"\r\n"), "git lfs pull"),
    "HTML": (b"<!DOCTYPE html>\n<html><title>Hugging Face</title>", r"a web page \(HTML\).*Download it again"),
    "html after blanks": (b"\n\n  <html lang='zh'>\xe4\xbd\xa0", "a web page"),
    "XML": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "XML text, probably a server's error.*AccessDenied",
    ),
    "JSON": (b'{"error": "Repository not found"}', "JSON text, not a model.*Repository not found"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "the index of a model in several files"),
    "config.json": (
        b'{"architectures": ["RwkvForCausalLM"], "model_type": "rwkv"}',
        "the configuration of a transformers model",
    ),
    "adapter_config.json": (b'{"peft_type": "LORA", "r": 8}', "the configuration of a peft adapter"),
    "text": (b"Once upon a time", 'text, not a model: "Once upon a time'),
    "text in UTF-16": ("hello world".encode("utf-16"), "text, not a model"),
    "text with escapes": (b"\x1b[31mred\x1b[0m", "not a model"),
    "empty": (b"", "empty. Download it again"),
    "zeros": (bytes(5000), "an incomplete download"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), r"a GGUF file \(llama.cpp\)"),
    "GGML": ((0x67676D66).to_bytes(4, "little") + bytes(100), r"a GGML file \(rwkv.cpp\)"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "compressed with gzip. Unpack"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(100), "compressed with zstd. Unpack"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(100), "a 7z archive. Unpack"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5.*not an RWKV checkpoint. Use a .pth"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x051.13" + bytes(100), "an ONNX model"),
    "parquet": (b"PAR1" + bytes(100), "a parquet file: data, not a model. Use a .pth or .safetensors file"),
    "random": (bytes([0xDE, 0xAD, 0xBE, 0xEF]) * 100, "not a checkpoint: neither a torch.save nor"),
    "a pickle": (pickle.dumps({"a": 1}, 4), "not one that torch.save wrote"),
}


def numpy_file() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def numpy_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def zip_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return buffer.getvalue()


def tar_of() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("model.pth"))
    return buffer.getvalue()


CONTENTS |= {
    "numpy": (numpy_file(), "a numpy array"),
    "numpy archive": (numpy_archive(), r"a numpy archive \(.npz\)"),
    "zip": (zip_of("a/model.pth"), "a zip archive. Unpack it, and use a/model.pth from it"),
    "zip of something": (zip_of("readme.txt"), "a zip archive, but not one that torch.save wrote"),
    "tar": (tar_of(), "a tar archive. Unpack it first"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".bin"])
def test_non_checkpoints_identified(tmp_path, name, ending):
    content, message = CONTENTS[name]
    path = tmp_path / f"x{ending}"
    path.write_bytes(content)
    for read in (load_model, inspect_adapter):
        with pytest.raises(UserError, match=rf"x{ending}: .*{message}") as error:
            read(path)
        assert "\x1b" not in str(error.value)


class Whole:
    """An object that is pickled by its class name."""


def quantised() -> dict:
    return {
        **block(att__key__weight=(16, 16)),
        "blocks.0.att.key.weight": torch.zeros(16, 16, dtype=torch.uint8),
        "blocks.0.att.key.weight_mx": torch.zeros(16),
    }


ATT = {"att__time_decay": (16,), "ffn__key__weight": (64, 16)}
VALUES = {
    "list": ([torch.zeros(2), torch.zeros(2)], "a list of 2 tensors, such as an inference state"),
    "tensor": (torch.zeros(2), "contains a Tensor, not a dictionary of tensors"),
    "empty": ({}, "an empty dictionary"),
    "a number among tensors": (
        {"emb.weight": torch.zeros(2, 2), "step": 3},
        "its entry 'step' is of type int, not a tensor",
    ),
    "numbers as keys": ({0: torch.zeros(2)}, "its key 0 is of type int, not the name of a tensor"),
    "bytes as keys": ({b"emb.weight": torch.zeros(2)}, "its key b'emb.weight' is of type bytes, not the name"),
    "two models": (
        {"model": {"emb.weight": torch.zeros(2)}, "state_dict": {"emb.weight": torch.ones(2)}},
        "has tensors under state_dict and model",
    ),
    "a step among tensors": ({**block(**ATT), "step": torch.tensor(3)}, "not a checkpoint of a model: step is int64"),
    "optimizer": (
        {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]},
        "an optimizer state",
    ),
    "DeepSpeed's optimizer": (
        {"optimizer_state_dict": {"loss_scaler": None}, "ds_version": "0.7.0"},
        "an optimizer state",
    ),
    "resume state": ({"format": 1, "tensors": [torch.zeros(2)], "text": "{}"}, "the training state of a run"),
    "PyPI rwkv": (
        {"_strategy": "cpu fp32", "_version": 0.7, "_rescale_layer": 0, "emb.weight": torch.zeros(2, 2)},
        "converted for inference by the PyPI package rwkv",
    ),
    "numpy inside": ({"emb.weight": np.zeros((2, 2))}, "a file that contains numpy arrays"),
    "a whole model": ({"model": torch.nn.Linear(2, 2)}, "a whole model object, which is code"),
    "settings": (
        {"args": __import__("argparse").Namespace(a=1)},
        "a training checkpoint that contains more than weights",
    ),
    "int8": (
        {**block(**ATT), "emb.weight": torch.zeros(50, 16, dtype=torch.int8)},
        "quantised for inference: emb.weight is int8",
    ),
    "fp16i8": (
        quantised(),
        r"quantised to 8 bits for inference \(PyPI rwkv's fp16i8\): blocks.0.att.key.weight is uint8",
    ),
    "bool": ({**block(**ATT), "emb.weight": torch.zeros(50, 16, dtype=torch.bool)}, "emb.weight is bool"),
    "int64": ({**block(**ATT), "emb.weight": torch.zeros(50, 16, dtype=torch.int64)}, "emb.weight is int64"),
    "complex": ({**block(**ATT), "emb.weight": torch.zeros(50, 16, dtype=torch.complex64)}, "emb.weight is complex64"),
    "sparse": ({**block(**ATT), "emb.weight": torch.zeros(50, 16).to_sparse()}, "emb.weight is sparse"),
    "meta": ({**block(**ATT), "emb.weight": torch.zeros(50, 16, device="meta")}, "emb.weight is on the meta device"),
    "quantised by torch": (
        {"emb.weight": torch.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.qint8)},
        "emb.weight is quantised",
    ),
    "expanded": (
        {**block(**ATT), "emb.weight": torch.zeros(1, 1).expand(1 << 20, 1 << 20)},
        "emb.weight of shape .* has 1,099,511,627,776 elements",
    ),
    "ZeRO-3": (
        {name: torch.zeros(0) for name in block(**ATT)},
        "weights are in other files .*ZeRO stage 3.*zero_to_fp32.py",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VALUES)
def test_torch_files_without_model_identified(tmp_path, name):
    value, message = VALUES[name]
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"x.pth: .*({message})"):
        load_model(tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth: "):
        inspect_adapter(tmp_path / "x.pth", alpha=1.0)


VERSIONS = {
    "RWKV-8": block(ffn__enn__weight=(50, 16), att__r_k=(2, 8)),
    "RWKV-7b": block(qkv__qq__weight=(16, 16), ffn__s_emb__weight=(50, 16), att__r_k=(2, 8)),
    "RWKV-7a": block(ffn__s_emb__weight=(50, 16), att__r_k=(2, 8)),
    r"RWKV-6 \(x060b or x060c\)": block(att__time_maa_x=(1, 1, 16), att__time_maa_rkvw_w1=(16, 4)),
    r"RWKV-6 \(x060a\)": block(att__time_maa_x=(1, 1, 16), att__gate_w1=(16, 4)),
    "RWKV-5.1 ": block(att__gate__weight=(16, 16), att__time_decay=(2,), att__ln_x__weight=(16,)),
    "RWKV-5.1 model": block(att__gate__weight=(16, 16), att__time_decay=(2, 1), att__ln_x__weight=(16,)),
    "RWKV-5.0": block(att__time_decay=(2,), att__ln_x__weight=(16,), ffn__key__weight=(64, 16)),
    "a tuned state with token shifts": {"blocks.0.att.ts_state": torch.zeros(16)},
    "Bone, DiSHA": {"blocks.0.att.key.bone": torch.zeros(4, 16)},
    "DiSHA or MiSS": {"blocks.0.att.key.disha": torch.zeros(4, 16)},
    "initial matrices of PiSSA": {"model.blocks.0.att.key.init_lora_A": torch.zeros(4, 16)},
    "flash-linear-attention": {"model.layers.0.attn.r_proj.weight": torch.zeros(16, 16)},
    "names of GGUF": {"blk.0.attn_norm.weight": torch.zeros(16)},
    "another architecture": {"model.layers.0.self_attn.q_proj.weight": torch.zeros(16, 16)},
    "another architecture, ": {"transformer.h.0.attn.c_attn.weight": torch.zeros(16, 16)},
    "quantised model": {"blocks.0.att.key.qweight": torch.zeros(16, 16)},
}


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_other_models_and_adapters_identified(tmp_path, name, ending):
    path = tmp_path / f"x{ending}"
    torch.save(VERSIONS[name], path) if ending == ".pth" else safetensors.torch.save_file(VERSIONS[name], path)
    for read in (
        load_model,
        lambda path: inspect_adapter(path, alpha=8.0),
        lambda path: checkpoint.sizes_of(read_tensors(path), path),
    ):
        with pytest.raises(UserError, match=f"x{ending}: .*{name}"):
            read(path)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "_forward_module.",
        "_orig_mod.",
        "module._orig_mod.",
        "model.module.",
        "rwkv.",
        "_fsdp_wrapped_module.",
    ],
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module", "model_state_dict"])
def test_wrappers_removed(tmp_path, make_model, prefix, wrapper):
    weights = {name: parameter.detach() for name, parameter in make_model().named_parameters()}
    named = OrderedDict((prefix + name, tensor) for name, tensor in weights.items())
    torch.save(
        {wrapper: named, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}} if wrapper else named,
        tmp_path / "x.pth",
    )
    found = load_model(tmp_path / "x.pth")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in found.named_parameters())


def test_colliding_names(tmp_path, make_model):
    weights = {name: parameter.detach() for name, parameter in make_model().named_parameters()}
    torch.save({**weights, "module.emb.weight": weights["emb.weight"] + 1}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="has emb.weight twice"):
        load_model(tmp_path / "x.pth")


def test_transformers_rwkv4_model(script, make_base, tmp_path):
    base = make_base()
    script("export.py", "--model", base, "--output", "hf", "--check_tokens", 0)
    expected = read_tensors(base)
    tensors = safetensors.torch.load_file(tmp_path / "hf/model.safetensors")
    torch.save(tensors, tmp_path / "hf/pytorch_model.bin")
    for name in ("model.safetensors", "pytorch_model.bin"):
        found = read_tensors(tmp_path / "hf" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        load_model(tmp_path / "hf" / name)
    assert read_tensors(tmp_path / "hf").keys() == expected.keys()
    with pytest.raises(UserError, match=r"hf: a transformers folder; use the file in it: .*hf/model.safetensors"):
        sizes_of(LoRAConfig(load_model=str(tmp_path / "hf")))


def test_folders_identified(tmp_path):
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds/zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/rwkv-3.pth").touch()
    for folder, message in {
        "ds": "DeepSpeed",
        "run": "use a file in it, such as .*rwkv-3.pth",
        ".": "a folder",
    }.items():
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / folder)


def test_safetensors_by_content_and_corrupt(tmp_path, make_model):
    weights = {name: parameter.detach() for name, parameter in make_model().named_parameters()}
    safetensors.torch.save_file(weights, tmp_path / "x.pth")
    assert read_tensors(tmp_path / "x.pth").keys() == weights.keys()
    data = (tmp_path / "x.pth").read_bytes()
    header = int.from_bytes(data[:8], "little")
    path = tmp_path / "y.safetensors"
    for content, message in {
        data[:-100]: rf"truncated: it has {len(data) - 100:,} bytes of {len(data):,}",
        data[:50]: "truncated",
        data[:8] + b"{" * header + data[8 + header :]: "header is corrupt",
        data[:8] + b"[" + data[9:]: "not a checkpoint|text",
        data.replace(b'"F32"', b'"I32"', 1): "is I32",
        data.replace(b'"F32"', b'"F8"  '[:5], 1): "corrupt|is F8",
        data[:8] + b'{"a":' + b"[" * (header - 6) + b"}" + data[8 + header :]: "header is corrupt",
        data[:8]
        + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}'.ljust(header)
        + data[8 + header :]: "not a valid safetensors file",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"y.safetensors: .*({message})"):
            load_model(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf_found(tmp_path, make_model, value, dtype):
    weights = {name: parameter.detach().to(dtype) for name, parameter in make_model().named_parameters()}
    for key, place in (("emb.weight", (0, 0)), ("head.weight", (49, 15)), ("blocks.1.ln2.bias", (3,))):
        bad = {**weights, key: weights[key].clone()}
        bad[key][place] = value
        torch.save(bad, tmp_path / "x.pth")
        with pytest.raises(UserError, match=rf"x.pth: {key} contains {'NaN' if value != value else 'Inf'}"):
            load_model(tmp_path / "x.pth")


def test_large_finite_values_accepted(tmp_path, make_model):
    weights = {name: parameter.detach() for name, parameter in make_model().named_parameters()}
    weights["head.weight"] = torch.full((50, 16), 3e38)
    torch.save(weights, tmp_path / "x.pth")
    load_model(tmp_path / "x.pth")


def test_huge_layer_number_fails_fast(tmp_path, make_model):
    weights = {name: parameter.detach() for name, parameter in make_model().named_parameters()}
    torch.save({**weights, "blocks.999999999.ln1.weight": torch.zeros(16)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"block 2 is missing \(the last one is 999999999\)"):
        load_model(tmp_path / "x.pth")
    many = {f"blocks.{i}.ln1.weight": torch.zeros(1) for i in range(5000)}
    torch.save({**many, **weights}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="missing: blocks.10.att.key.weight"):
        load_model(tmp_path / "x.pth")


def test_control_characters_in_names_escaped(tmp_path):
    torch.save({**block(**ATT), "\x1b[31mevil\x9b\u202e": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "x.pth")
    assert not set("\x1b\x9b\u202e") & set(str(error.value))
    assert "evil" in str(error.value)


def test_permission_denied(tmp_path, make_base, monkeypatch):
    base = make_base()

    def denied(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", denied)  # root may read everything
    with pytest.raises(UserError, match="base.pth: no permission to read"):
        load_model(base)
