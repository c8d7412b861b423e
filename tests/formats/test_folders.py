"""Folders of transformers and flash-linear-attention: read by transformers and PyPI's rwkv7-hf, and
read back.
"""

import json

import pytest
import safetensors.torch
import torch
import transformers

from rwkv import checkpoint, export, export_folder
from rwkv.config import ExportConfig, TrainConfig
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError
from rwkv.formats import hf_tokenizer
from rwkv.train.setup import sizes_of
from tests.formats.oracle import ask, script_main
from tests.oracle import needs_oracle

IDS = list(range(1, 40))
# rwkv7-hf reads the fla layout; of the official one, its own converter takes BlinkDL's names.
RWKV7_HF = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from rwkv7_hf.converter import infer_config, translate_name
from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM
from rwkv7_hf.tokenization_rwkv7 import RWKV7Tokenizer
from safetensors.torch import load_file
folders, ids, text, vocabulary = map(json.loads, sys.argv[2:])
found = []
for folder in folders:
    layout = json.load(open(folder + "/config.json"))["architectures"][0]
    if layout == "RWKV7ForCausalLM":
        model, info = RWKV7ForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
    else:
        weights = load_file(folder + "/model.safetensors")
        weights = {name.removeprefix("rwkv7."): weight.float() for name, weight in weights.items()}
        config = infer_config(weights, "float32", "reference", False)
        model = RWKV7ForCausalLM(config)
        missing = dict(model.named_parameters())
        for name, weight in weights.items():
            other, transposed = translate_name(name, config.num_hidden_layers)
            if other:
                target = missing.pop(other)
                target.data.copy_((weight.t() if transposed else weight).reshape(target.shape))
        assert not missing, missing.keys()
    with torch.no_grad():
        found.append(model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].tolist())
tokenizer = RWKV7Tokenizer.from_pretrained(vocabulary) if vocabulary else None
print(json.dumps([found, tokenizer(text)["input_ids"] if tokenizer else None]))
"""


@needs_oracle
def test_rwkv7_hf_gives_our_logits(model_file, tmp_path, capsys):
    folders, expected = [], []
    for trained in (False, True):
        base = model_file("7", trained, v_in_block_0=trained)
        for layout in ("fla", "transformers"):
            folders.append(str(tmp_path / f"{layout}-{trained}"))
            script_main()(ExportConfig(model=str(base), output=folders[-1], format=layout, check_tokens=8))
            assert "weights 0.00e+00, logits 0.00e+00" in capsys.readouterr().out
            with torch.no_grad():
                expected.append(checkpoint.load_model(base)(torch.tensor([IDS]))[0][0])
    vocabulary = tmp_path / "world"
    large = export.open_source(model_file("7", n_layer=1, n_embd=64, vocab_size=65536))
    export_folder.export_folder(large, vocabulary, "fla", "bf16", 0, 4096, 10**9)
    assert json.loads((vocabulary / "config.json").read_text())["torch_dtype"] == "bfloat16"
    text = "Hello, RWKV! \n\nUser: 你好，世界 😀\t<|endoftext|>" + "a" * 50
    found, ids = ask(RWKV7_HF, folders, IDS, text, str(vocabulary))
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-4, atol=1e-4)  # fp32, different order of sums
    assert ids == WorldTokenizer().encode(text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(vocabulary)  # without code from the folder
    assert tokenizer(text)["input_ids"] == ids
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}  # what generate() takes
    assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id) == (65536, 0)
    chat = [{"role": "user", "content": "Hi\r\n\r\nthere"}, {"role": "assistant", "content": "Hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "User: Hi\nthere\n\nAssistant: Hello\n\n"
    given = "".join(f"{i} {line}" for i, line in enumerate(["'a' 1\n", "b'\\xff' 1\n"], 1))
    assert hf_tokenizer.files([b"", b"a", b"\xff"], 3)[hf_tokenizer.VOCABULARY] == given


def test_transformers_reads_shards_of_rwkv4(model_file, tmp_path):
    base = model_file("4", True)
    script_main()(ExportConfig(model=str(base), output=str(tmp_path / "hf"), max_shard_gb=5e-4, check_tokens=8))
    shards = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert all((tmp_path / "hf" / name).stat().st_size < 5.2e5 for name in shards)
    theirs = transformers.RwkvForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor([IDS]), use_cache=False).logits
        ours = checkpoint.load_model(base)(torch.tensor([IDS]))[0]
        torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-4)  # fp32, different order of sums
    back = checkpoint.read_tensors(tmp_path / "hf")
    original = checkpoint.read_tensors(base)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())
    with pytest.raises(UserError, match=r"hf/model.safetensors.index.json already exists; pass --force"):
        script_main()(ExportConfig(model=str(base), output=str(tmp_path / "hf")))
    # one file replaces the shards and their index
    script_main()(ExportConfig(model=str(base), output=str(tmp_path / "hf"), force=True, check_tokens=0))
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]


def test_folder_becomes_one_file(model_file, tmp_path, capsys):
    """transformers to .pth: also in shards, and in fla's older layout."""
    base = model_file("7", True)
    original = checkpoint.read_tensors(base)
    script_main()(ExportConfig(model=str(base), output=str(tmp_path / "hf"), max_shard_gb=5e-4, check_tokens=0))
    older = {}
    for path in (tmp_path / "hf").glob("*.safetensors"):
        older.update(safetensors.torch.load_file(path))
    for i in range(2):
        mixed = [older.pop(f"model.layers.{i}.attn.x_{letter}").reshape(1, -1) for letter in "rwkvag"]
        older[f"model.layers.{i}.attn.x_x"] = torch.cat(mixed)
    (tmp_path / "older").mkdir()
    safetensors.torch.save_file(older, tmp_path / "older/model.safetensors")
    for folder in ("hf", "older"):
        script_main()(
            ExportConfig(model=str(tmp_path / folder), output=str(tmp_path / f"{folder}.pth"), check_tokens=8)
        )
        assert "weights 0.00e+00, logits 0.00e+00" in capsys.readouterr().out
        back = checkpoint.read_tensors(tmp_path / f"{folder}.pth")
        assert back.keys() == original.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in original.items())
    with pytest.raises(UserError, match=r"one file of it: python scripts/export.py --model FOLDER --output model.pth"):
        sizes_of(TrainConfig(load_model=str(tmp_path / "hf")))


def test_invalid_folders(model_file, tmp_path):
    base = model_file("7", True)
    script_main()(ExportConfig(model=str(base), output=str(tmp_path / "hf"), max_shard_gb=5e-4, check_tokens=0))
    index = tmp_path / "hf/model.safetensors.index.json"
    listed = json.loads(index.read_text())
    for places, message in {
        "../x.safetensors": "is not the name of a file in its folder",
        "none.safetensors": "none.safetensors is missing",
        "": "is not the name of a file",
    }.items():
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": places}}))
        with pytest.raises(UserError, match=message):
            checkpoint.read_tensors(tmp_path / "hf")
    index.write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        checkpoint.read_tensors(tmp_path / "hf")
    index.write_text(json.dumps(listed))
    config = json.loads((tmp_path / "hf/config.json").read_text())
    for size in (32, 10**400):
        (tmp_path / "hf/config.json").write_text(json.dumps(config | {"head_dim": size}))
        with pytest.raises(
            UserError, match=rf"config.json: heads of {size} channels.* only BlinkDL's 64e-5 is supported"
        ):
            checkpoint.read_tensors(tmp_path / "hf")


def test_models_without_a_layout(model_file, make_base, tmp_path):
    for version in ("5.2", "6"):
        with pytest.raises(UserError, match=rf"an RWKV-{version} model; a folder can be written of RWKV-4 and 7 only"):
            script_main()(ExportConfig(model=str(model_file(version)), output=str(tmp_path / "hf")))
    with pytest.raises(UserError, match="an RWKV-4 model; fla can be written of RWKV-7 only"):
        script_main()(ExportConfig(model=str(model_file("4")), output=str(tmp_path / "hf"), format="fla"))
    with pytest.raises(UserError, match="the head size is 16, but transformers folders of RWKV-7 have 64"):
        script_main()(ExportConfig(model=str(make_base(version="7")), output=str(tmp_path / "hf")))
    assert not (tmp_path / "hf").exists()
