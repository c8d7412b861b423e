"""merge_lora.py and export.py verify what they write, and reject misleading suffixes."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from rwkv.adapter_files import save_adapter
from rwkv.adapters import lora
from rwkv.checkpoint import load_model, read_manifest, read_tensors, save_model
from rwkv.config import ExportConfig, MergeConfig
from rwkv.errors import UserError
from rwkv.files import sha256

SCRIPTS = Path(__file__).parents[2] / "scripts"


def main(name: str):
    """The main function of a script."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def tuned(tmp_path, make_model):
    """Create a base of a dtype, and an adapter on it with non-zero B."""

    def make(dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        model = make_model().to(dtype)
        save_model(tmp_path / "base.pth", model, {})
        lora.inject(model, ["att"], 4, 8)
        with torch.no_grad():
            for name in lora.adapter_names(model, ["att"]):
                model.get_parameter(name).normal_(generator=torch.Generator().manual_seed(0))
        known = {
            "r": 4,
            "alpha": 8,
            "parts": ["att"],
            "base": str(tmp_path / "base.pth"),
            "base_sha256": sha256(tmp_path / "base.pth"),
        }
        save_adapter(tmp_path / "run/adapter.pth", model, known, {"tokenizer": "World"})
        return tmp_path / "base.pth", tmp_path / "run/adapter.pth"

    return make


@pytest.mark.parametrize(
    ("dtype", "weights", "tokens"),
    [(torch.float32, "1e38", 8), (torch.float32, "1e38", 0), (torch.float16, "1e5", 0), (torch.float16, "1e5", 8)],
)
def test_nonfinite_merge_writes_nothing(tuned, tmp_path, dtype, weights, tokens):
    _, adapter = tuned(dtype)
    output = tmp_path / "merged.pth"
    with pytest.raises(UserError, match="NaN or Inf"):
        main("merge_lora")(MergeConfig(adapter=str(adapter), output=str(output), weights=weights, check_tokens=tokens))
    assert not list(tmp_path.glob("*merged*"))


def test_failed_merge_keeps_old_file(tuned, tmp_path):
    base, adapter = tuned()
    save_model(tmp_path / "merged.pth", load_model(base), {"step": 1})
    before = (tmp_path / "merged.pth").read_bytes()
    with pytest.raises(UserError, match="NaN or Inf"):
        main("merge_lora")(
            MergeConfig(adapter=str(adapter), output=str(tmp_path / "merged.pth"), weights="1e38", force=True)
        )
    assert (tmp_path / "merged.pth").read_bytes() == before
    assert read_manifest(tmp_path / "merged.pth")["step"] == 1


@pytest.mark.parametrize("weights", ["nan", "inf", "1,", "x"])
def test_merge_weights_must_be_finite(tuned, tmp_path, weights):
    _, adapter = tuned()
    with pytest.raises(UserError, match="--weights"):
        main("merge_lora")(MergeConfig(adapter=str(adapter), output=str(tmp_path / "merged.pth"), weights=weights))


def test_merged_model_dtype_and_manifest(tuned, tmp_path, capsys):
    _, adapter = tuned(torch.bfloat16)
    main("merge_lora")(MergeConfig(adapter=str(adapter), output=str(tmp_path / "out/merged.safetensors")))
    assert "largest logit difference between merged and base + adapter" in capsys.readouterr().out
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out/merged.safetensors").values()} == {torch.bfloat16}
    manifest = read_manifest(tmp_path / "out/merged.safetensors")
    assert (manifest["base"], manifest["merged_from"]) == ("../base.pth", {"../run/adapter.pth": 1.0})
    assert str(tmp_path) not in json.dumps(manifest)


def test_missing_base(tuned, tmp_path):
    base, adapter = tuned()
    base.unlink()
    with pytest.raises(UserError, match=r"its base \.\./base.pth \(named in its .json\) does not exist; pass --base"):
        main("merge_lora")(MergeConfig(adapter=str(adapter), output=str(tmp_path / "merged.pth")))


@pytest.mark.parametrize("name", ["blocks.1.att.key.lora_A", "blocks.1.att.key", "blocks.0.ln1.bias", "rank"])
def test_incomplete_adapter(tmp_path, make_model, name):
    """Without the comparison of logits too, export does not merge a part of an adapter."""
    model, adapter = make_model(), tmp_path / "adapter.pth"
    save_model(tmp_path / "base.pth", model, {})
    lora.inject(model, ["att", "ln"], 4, 8)
    tensors = {key: tensor.detach() for key, tensor in lora.adapter_state(model, ["att", "ln"]).items()}
    if name == "rank":
        tensors["blocks.1.att.key.lora_B"] = tensors["blocks.1.att.key.lora_B"][:, :2]
    else:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
    save_adapter(adapter, model, {"r": 4, "alpha": 8, "parts": ["att", "ln"]}, {}, tensors)
    output, base = tmp_path / "m.pth", str(tmp_path / "base.pth")
    with pytest.raises(UserError, match=rf"different ranks \(2, 4\)|missing: {name}"):
        main("export")(ExportConfig(model=base, lora=str(adapter), output=str(output), check_tokens=0))
    with pytest.raises(UserError, match=rf"different ranks \(2, 4\)|missing: {name}"):
        main("merge_lora")(MergeConfig(base=base, adapter=str(adapter), output=str(output), check_tokens=0))
    assert not output.exists()


@pytest.mark.parametrize("tokens", [-1, 1 << 40])
def test_check_tokens_out_of_range(tuned, tmp_path, tokens):
    """-1 is not silently "no check", and a large number does not exhaust the memory."""
    base, adapter = tuned()
    with pytest.raises(UserError, match=f"--check_tokens {tokens}: must be from 0"):
        main("merge_lora")(MergeConfig(adapter=str(adapter), output=str(tmp_path / "m.pth"), check_tokens=tokens))
    with pytest.raises(UserError, match=f"--check_tokens {tokens}: must be from 0"):
        main("export")(ExportConfig(model=str(base), output=str(tmp_path / "m.pth"), check_tokens=tokens))
    with pytest.raises(UserError, match="--lora_alpha needs an adapter"):
        main("export")(ExportConfig(model=str(base), output=str(tmp_path / "m.pth"), lora_alpha=8))


@pytest.mark.parametrize("name", ["model.onnx", "model.ggml", "model.PTH"])
def test_export_with_misleading_suffix(tuned, tmp_path, name):
    base, _ = tuned()
    with pytest.raises(
        UserError,
        match=rf"{name}: the suffix .* selects no format; use .pth, .safetensors, .gguf, .st, .bin, or none for a folder",
    ):
        main("export")(ExportConfig(model=str(base), output=str(tmp_path / name)))
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("job", "output", "mark"),
    [
        ("merge_lora", "m.pth", "m.pth.json"),
        ("export", "m.safetensors", "m.safetensors.json"),
        ("export", "hf", "hf/config.json"),
    ],
)
def test_rerun_after_a_kill_between_renames(tuned, make_model, tmp_path, monkeypatch, job, output, mark):
    """Without --force, although the output exists: its mark is missing."""
    if output == "hf":
        (tmp_path / output).mkdir()  # otherwise the failed export removes it
        save_model(tmp_path / "large.pth", make_model(version="7", n_embd=64, head_size=64), {})
        config = ExportConfig(model=str(tmp_path / "large.pth"), output=str(tmp_path / output))
    else:
        base, adapter = tuned()
        files = {"adapter": str(adapter)} if job == "merge_lora" else {"model": str(base)}
        config = (MergeConfig if job == "merge_lora" else ExportConfig)(**files, output=str(tmp_path / output))
    replace, unlink, killed = os.replace, Path.unlink, tmp_path / mark

    class Killed(BaseException):
        pass

    def replace_until_mark(source, target):
        if Path(target) == killed:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until_mark)
        patch.setattr(
            Path, "unlink", lambda path, **options: None if path.suffix == ".tmp" else unlink(path, **options)
        )
        with pytest.raises(Killed):
            main(job)(config)
    assert not killed.exists()
    assert list(killed.parent.glob(f".{killed.name}.*.tmp"))
    main(job)(config)
    assert killed.exists()
    assert not list(killed.parent.glob(".*"))
    with pytest.raises(UserError, match="already exists; pass --force"):
        main(job)(config)


@pytest.mark.parametrize("name", ["file", "dangling"])
def test_folder_in_place_of_file(tuned, tmp_path, name):
    base, _ = tuned()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{name}: a file or a broken link, but this format is a folder; pass another"):
        main("export")(ExportConfig(model=str(base), output=str(tmp_path / name), force=True))
    assert (tmp_path / "file").read_text() == "mine"


def test_failed_export_check_writes_nothing(tuned, tmp_path, make_model):
    model = make_model()
    with torch.no_grad():
        model.head.weight.fill_(3e38)  # finite, but its logits are not
    save_model(tmp_path / "large.pth", model, {})
    for name in ("x.pth", "x.safetensors", "hf-v1.5"):
        with pytest.raises(UserError, match="the export cannot be verified; nothing is written"):
            main("export")(ExportConfig(model=str(tmp_path / "large.pth"), output=str(tmp_path / name)))
        assert not (tmp_path / name).exists()
        assert not list(tmp_path.glob(".*"))
