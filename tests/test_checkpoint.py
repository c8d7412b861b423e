"""Checkpoints are compatible with upstream in both directions; mismatches are reported by tensor
name.
"""

import errno
import json
import pickle
from pathlib import Path

import pytest
import torch

from rwkv import checkpoint
from rwkv.adapter_files import inspect_adapter, load_tuned, save_adapter
from rwkv.adapters import lora
from rwkv.checkpoint import load_model, read_manifest, read_tensors, save_model
from rwkv.errors import UserError
from rwkv.files import sha256

UPSTREAM_KEYS = {
    "emb.weight": (50, 16), "head.weight": (50, 16), "ln_out.weight": (16,), "ln_out.bias": (16,), "blocks.0.ln0.weight": (16,), "blocks.0.ln0.bias": (16,),
    **{f"blocks.{i}.{ln}.{x}": (16,) for i in (0, 1) for ln in ("ln1", "ln2") for x in ("weight", "bias")},
    **{f"blocks.{i}.att.time_{x}": (24,) for i in (0, 1) for x in ("decay", "first")},
    **{f"blocks.{i}.att.time_mix_{x}": (1, 1, 16) for i in (0, 1) for x in "kvr"},
    **{f"blocks.{i}.att.{x}.weight": (24, 16) for i in (0, 1) for x in ("key", "value", "receptance")},
    **{f"blocks.{i}.att.output.weight": (16, 24) for i in (0, 1)},
    **{f"blocks.{i}.ffn.time_mix_{x}": (1, 1, 16) for i in (0, 1) for x in "kr"},
    **{f"blocks.{i}.ffn.key.weight": (40, 16) for i in (0, 1)},
    **{f"blocks.{i}.ffn.receptance.weight": (16, 16) for i in (0, 1)},
    **{f"blocks.{i}.ffn.value.weight": (16, 40) for i in (0, 1)},
}  # fmt: skip


def upstream_tensors():
    torch.manual_seed(0)
    return {key: torch.randn(shape) for key, shape in UPSTREAM_KEYS.items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_upstream_roundtrip(tmp_path, suffix):
    theirs = upstream_tensors()
    torch.save(theirs, tmp_path / "theirs.pth")
    model = load_model(tmp_path / "theirs.pth")
    assert (model.sizes.n_layer, model.sizes.dim_att, model.sizes.dim_ffn) == (2, 24, 40)
    save_model(tmp_path / f"ours{suffix}", model, {"step": 7})
    ours = read_tensors(tmp_path / f"ours{suffix}")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    manifest = read_manifest(tmp_path / f"ours{suffix}")
    assert (manifest["kind"], manifest["version"], manifest["step"], manifest["sizes"]["dim_att"]) == (
        "model",
        "4",
        7,
        24,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_load(tmp_path, dtype):
    torch.save({key: value.to(dtype) for key, value in upstream_tensors().items()}, tmp_path / "half.pth")
    assert {p.dtype for p in load_model(tmp_path / "half.pth").parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(tmp_path / "half.pth", dtype=None).parameters()} == {dtype}


def test_deepspeed_prefix_removed(tmp_path):
    torch.save({f"_forward_module.{key}": value for key, value in upstream_tensors().items()}, tmp_path / "p.pth")
    assert load_model(tmp_path / "p.pth").sizes.n_layer == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.ln2.bias"), "missing: blocks.1.ln2.bias"),
        (lambda t: t.update({"blocks.1.extra": torch.zeros(1)}), "unexpected: blocks.1.extra"),
        (
            lambda t: t.update({"head.weight": torch.zeros(49, 16)}),
            r"wrong shape: head.weight \[49, 16\], expected \[50, 16\]",
        ),
        (
            lambda t: t.update({"blocks.1.ffn.key.weight": torch.zeros(44, 16)}),
            r"wrong shape: blocks.1.ffn.key.weight \[44, 16\]",
        ),
        (lambda t: t.pop("emb.weight"), r"not an RWKV-4 checkpoint \(no emb.weight\)"),
        (lambda t: t.update({"blocks.0.att.time_decay": torch.zeros(4, 6)}), "version 5 or later"),
    ],
)
def test_mismatched_keys(tmp_path, change, message):
    tensors = upstream_tensors()
    change(tensors)
    torch.save(tensors, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=f"bad.pth: .*{message}"):
        load_model(tmp_path / "bad.pth")


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_pickle_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"emb.weight": Malicious()}, "zip.pth")
    Path("raw.pth").write_bytes(pickle.dumps(Malicious()))
    for name in ("zip.pth", "raw.pth"):
        with pytest.raises(UserError, match=f"{name}: not a checkpoint"):
            load_model(name)
    assert not Path("ran").exists()


def test_not_a_checkpoint(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"model": {"emb.weight": torch.zeros(1)}}, tmp_path / "nested.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save(upstream_tensors(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-1000])
    for name in ("list.pth", "nested.pth", "text.pth", "empty.pth", "text.safetensors", "cut.pth", "none.pth"):
        with pytest.raises(UserError, match=name):
            load_model(tmp_path / name)


def tuned(tmp_path, make_base, parts=("att", "time", "ln"), alpha=12):
    """A base, an adapter on it without zero elements, and the model of both."""
    base = make_base()
    model = load_model(base).eval()
    lora.inject(model, parts, 4, alpha)
    torch.manual_seed(1)
    with torch.no_grad():
        for name in lora.adapter_names(model, parts):
            model.get_parameter(name).add_(torch.randn(model.get_parameter(name).shape) * 0.1)
    known = {"r": 4, "alpha": alpha, "parts": list(parts), "base": str(base), "base_sha256": sha256(base)}
    save_adapter(tmp_path / "adapter.pth", model, known, {})
    return base, tmp_path / "adapter.pth", model


@pytest.mark.parametrize("parts", [["att"], ["ffn", "ln"], ["att", "ffn", "time", "ln"], ["time"]])
def test_adapter_roundtrip(tmp_path, make_base, parts):
    base, adapter, model = tuned(tmp_path, make_base, parts)
    tokens = torch.arange(20)[None]
    assert torch.equal(load_tuned(base, adapter)[0].eval()(tokens)[0], model(tokens)[0])
    manifest = read_manifest(adapter)
    assert (manifest["kind"], manifest["r"], manifest["alpha"], manifest["parts"]) == ("adapter", 4, 12, parts)


@pytest.mark.parametrize(
    ("parts", "found"),
    [(["att"], ["att"]), (["att", "ffn"], ["att", "ffn"]), (["att", "time", "ln"], ["att", "time", "ln"])],
    ids=str,
)
@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_adapter_of_later_version_without_manifest(tmp_path, make_base, version, parts, found):
    """As RWKV-PEFT writes them: the version is that of the base. RWKV-4's `att` lacks output."""
    base = make_base(version=version, n_embd=32)
    model = load_model(base).eval()
    lora.inject(model, parts, 4, 12)
    for name in lora.adapter_names(model, parts):
        torch.nn.init.normal_(model.get_parameter(name), std=0.1)
    known = {"r": 4, "alpha": 12, "parts": parts, "base": str(base), "base_sha256": sha256(base)}
    save_adapter(tmp_path / "adapter.pth", model, known, {})
    assert read_manifest(tmp_path / "adapter.pth")["version"] == version
    checkpoint.manifest_path(tmp_path / "adapter.pth").unlink()
    assert inspect_adapter(tmp_path / "adapter.pth", base, 12)[1]["parts"] == found
    tokens = torch.arange(20)[None]
    assert torch.equal(load_tuned(base, tmp_path / "adapter.pth", 12)[0].eval()(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("unused", [False, True])
def test_rwkv7_roundtrip(tmp_path, make_model, suffix, unused):
    """v0, v1, v2 of block 0, which nothing uses, are written if they were read."""
    model = make_model(version="7", n_embd=32, v_in_block_0=unused, rank_g=40)
    checkpoint.save_model(tmp_path / f"x{suffix}", model, {})
    again = load_model(tmp_path / f"x{suffix}")
    assert again.sizes == model.sizes
    checkpoint.save_model(tmp_path / f"y{suffix}", again, {})
    first, second = (read_tensors(tmp_path / f"{name}{suffix}") for name in "xy")
    assert ("blocks.0.att.v1" in first) == unused
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("version", "ranks"), [("5.2", {}), ("6", {"rank_mix": 40, "rank_w": 24})])
def test_roundtrip_of_versions_with_gate(tmp_path, make_model, suffix, version, ranks):
    model = make_model(version=version, n_embd=32, dim_att=48, **ranks)
    checkpoint.save_model(tmp_path / f"x{suffix}", model, {})
    again = load_model(tmp_path / f"x{suffix}")
    assert again.sizes == model.sizes
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("version", "change", "complaint"),
    [
        (
            "5.2",
            lambda t: t.pop("blocks.1.att.time_mix_v"),
            r"missing: blocks.1.att.time_mix_v\. Use a complete checkpoint of one model$",
        ),
        ("5.2", lambda t: t.update({"blocks.0.att.time_decay": torch.zeros(2)}), "an RWKV-5.1 model"),
        (
            "5.2",
            lambda t: t.update({"blocks.0.att.time_decay": torch.zeros(2, 4, 4)}),
            r"time_decay is \[2, 4, 4\], not",
        ),
        (
            "5.2",
            lambda t: t.update({"blocks.0.ffn.time_mix_k": torch.zeros(32)}),
            r"wrong shape: blocks.0.ffn.time_mix_k",
        ),
        (
            "6",
            lambda t: t.pop("blocks.1.att.time_maa_w"),
            r"missing: blocks.1.att.time_maa_w\. Use a complete checkpoint of one model$",
        ),
        ("6", lambda t: t.pop("blocks.0.att.time_faaaa"), r"not an RWKV-6 checkpoint \(no blocks.0.att.time_faaaa\)"),
        (
            "6",
            lambda t: t.update({"blocks.1.att.time_decay_w2": torch.zeros(4, 32)}),
            r"wrong shape: .*decay_w2 \[4, 32\]",
        ),
        (
            "6",
            lambda t: t.update({"blocks.0.att.time_faaaa": torch.zeros(4, 8)}),
            "head size is 8; it must be a multiple",
        ),
        ("6", lambda t: t.update({"blocks.0.att.time_maa_rkvw_w1": torch.zeros(32, 8)}), "x060b or x060c"),
        ("6", lambda t: t.update({"blocks.0.att.gate_w1": torch.zeros(32, 8)}), "x060a"),
        (
            "7",
            lambda t: t.pop("blocks.1.att.w0"),
            r"missing: blocks.1.att.w0\. Use a complete checkpoint of one model$",
        ),
        ("7", lambda t: t.pop("blocks.0.att.r_k"), r"not an RWKV-7 checkpoint \(no blocks.0.att.r_k\)"),
        ("7", lambda t: t.update({"blocks.1.att.g2": torch.zeros(4, 32)}), r"wrong shape: blocks.1.att.g2 \[4, 32\]"),
        (
            "7",
            lambda t: t.update({"blocks.0.att.v1": torch.zeros(32, 32)}),
            "missing: blocks.0.att.v0, blocks.0.att.v2",
        ),
        ("7", lambda t: t.update({"blocks.0.att.r_k": torch.zeros(3, 16)}), r"r_k is \[3, 16\], but the width is 32"),
        (
            "7",
            lambda t: t.update({"blocks.0.att.r_k": torch.zeros(4, 8)}),
            "head size is 8; it must be a multiple of 16",
        ),
        ("7", lambda t: t.update({"blocks.0.ffn.s_emb.weight": torch.zeros(50, 4)}), "an RWKV-7a"),
    ],
)
def test_invalid_checkpoints_of_later_versions(tmp_path, make_model, version, change, complaint):
    tensors = {name: p.detach() for name, p in make_model(version=version, n_embd=32).named_parameters()}
    change(tensors)
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(UserError, match=complaint):
        load_model(tmp_path / "x.pth")


def test_adapter_of_other_base(tmp_path, make_base):
    _, adapter, _ = tuned(tmp_path, make_base)
    other = make_base("other.pth", seed=5)
    with pytest.raises(UserError, match=r"adapter of another base: trained on .*base.pth"):
        load_tuned(other, adapter)


def test_upstream_adapter_needs_alpha(tmp_path, make_base):
    base, adapter, model = tuned(tmp_path, make_base)
    checkpoint.manifest_path(adapter).unlink()
    with pytest.raises(UserError, match="its alpha is unknown"):
        load_tuned(base, adapter)
    tokens = torch.arange(20)[None]
    assert torch.equal(load_tuned(base, adapter, alpha=12)[0].eval()(tokens)[0], model(tokens)[0])


def test_alpha_differs_from_training(tmp_path, make_base):
    base, adapter, _ = tuned(tmp_path, make_base)
    with pytest.raises(UserError, match="trained with alpha 12, not 32"):
        load_tuned(base, adapter, alpha=32)


def test_adapter_is_not_a_model(tmp_path, make_base):
    base, adapter, _ = tuned(tmp_path, make_base)
    with pytest.raises(UserError, match="a LoRA adapter, not a model"):
        load_model(adapter)
    with pytest.raises(UserError, match="not a LoRA adapter"):
        inspect_adapter(base)


def test_adapter_of_other_sizes(tmp_path, make_base):
    _, adapter, _ = tuned(tmp_path, make_base)
    checkpoint.manifest_path(adapter).unlink()
    with pytest.raises(UserError, match=r"wrong shape: blocks.0.att.key.lora_A \[4, 16\], expected \[4, 24\]"):
        load_tuned(make_base("wide.pth", n_embd=24), adapter, alpha=12)
    with pytest.raises(UserError, match="unexpected: blocks.1"):
        load_tuned(make_base("short.pth", n_layer=1), adapter, alpha=12)


def test_failed_save_keeps_old_checkpoint(tmp_path, make_base, make_model, monkeypatch):
    base = make_base()
    before, manifest = base.read_bytes(), read_manifest(base)

    def die(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(UserError, match="base.pth: no space left on the device"):
        save_model(base, make_model(seed=9), {})
    assert base.read_bytes() == before
    assert read_manifest(base) == manifest
    assert not list(tmp_path.glob(".*"))


def test_mixed_dtypes_kept(tmp_path):
    mixed = {key: value.bfloat16() if value.dim() == 2 else value for key, value in upstream_tensors().items()}
    torch.save(mixed, tmp_path / "mixed.pth")
    loaded = load_model(tmp_path / "mixed.pth", dtype=None)
    assert all(torch.equal(parameter, mixed[name]) for name, parameter in loaded.named_parameters())


def test_invalid_manifest(tmp_path, make_base):
    base = make_base()
    checkpoint.manifest_path(base).write_text("{")
    with pytest.raises(UserError, match="base.pth.json: not valid JSON"):
        read_manifest(base)
    checkpoint.manifest_path(base).write_text(json.dumps({"kind": "model"}))
    assert read_manifest(base) == {"kind": "model"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_disk_full_at_manifest(tmp_path, make_model, monkeypatch, suffix):
    """Weights without their manifest would be refused as foreign by the next run of a command."""

    def full(value):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "json_text", full)
        with pytest.raises(UserError, match=r"no space left on the device.*Nothing was written"):
            save_model(tmp_path / f"m{suffix}", make_model(), {})
        assert not [*tmp_path.iterdir()]
    save_model(tmp_path / f"m{suffix}", make_model(), {"step": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(checkpoint, "json_text", full)
    with pytest.raises(UserError):
        save_model(tmp_path / f"m{suffix}", make_model(1), {"step": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_reserved_space_includes_texts(tmp_path, monkeypatch):
    """A disk that fills during torch.save crashes torch 1.13.1, so all is reserved before."""
    reserved = []
    monkeypatch.setattr(checkpoint, "reserve", lambda file, size: reserved.append(size))
    path = tmp_path / "state"
    path.touch()
    checkpoint.save({"text": "ü" * 100_000, "tensors": [torch.zeros(9)]}, path)
    assert reserved[0] >= path.stat().st_size > 200_000
