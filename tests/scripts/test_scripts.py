"""The scripts as a user runs them: a small end-to-end pipeline, errors with their exit status,
--help.
"""

import json
import re

import pytest
import torch

from rwkv.adapter_files import load_tuned
from rwkv.checkpoint import load_model, read_manifest, read_tensors
from rwkv.data.binidx_writer import writer
from rwkv.data.tokenizer import WorldTokenizer

TRAINING = [
    "--ctx_len",
    8,
    "--micro_bsz",
    2,
    "--epoch_count",
    1,
    "--epoch_steps",
    3,
    "--random_seed",
    1,
    "--accelerator",
    "cpu",
]
TRAINING += ["--precision", "fp32"]
SCRIPTS = ["convert", "export", "finetune", "generate", "inspect_data", "lora", "merge_lora", "pretrain", "serve"]
SCRIPTS += ["state", "dpo"]


def test_end_to_end_pipeline(script, write_jsonl, tmp_path):
    """Each script once in a fresh Python; of those that train, lora.py. (tests/train/callbacks
    start the others.)
    """
    text = write_jsonl(*({"text": f"User: {i}?\n\nAssistant: {i}."} for i in range(30)))
    result = script("convert.py", "--input", text, fresh=True)
    assert "30 documents" in result.stdout
    assert result.stderr == ""  # without a terminal progress is printed once a minute
    data = tmp_path / "text_text_document"
    script(
        "pretrain.py",
        "--data_file",
        data,
        "--version",
        4,
        "--n_layer",
        1,
        "--n_embd",
        8,
        "--proj_dir",
        "base",
        *TRAINING,
    )
    base = tmp_path / "base/rwkv-0.pth"
    result = script(
        "lora.py",
        "--load_model",
        base,
        "--data_file",
        text,
        "--proj_dir",
        "lora",
        "--lora",
        "--lora_r",
        2,
        "--lora_alpha",
        8,
        "--lr_init",
        1e-2,
        *TRAINING,
        fresh=True,
    )
    assert "loss" in result.stderr, "no progress bar"
    assert not re.search("warn|deprecat", result.stderr, re.IGNORECASE), result.stderr
    adapter = tmp_path / "lora/rwkv-0.pth"
    result = script("merge_lora.py", "--adapter", adapter, "--output", "merged.pth", fresh=True)
    difference = float(re.search(r"largest logit difference .* (\S+) \(", result.stdout)[1])
    assert difference < 1e-4  # fp32 rounding of logits of order 1
    (tmp_path / "positional.pth").touch()
    script("merge_lora.py", "--force", "8", base, adapter, "positional.pth")  # upstream's form
    merged, positional = (read_tensors(tmp_path / f"{name}.pth") for name in ("merged", "positional"))
    assert all(torch.equal(merged[key], positional[key]) for key in merged)
    script("merge_lora.py", "--adapter", f"{adapter},{adapter}", "--weights", "0.25,0.75", "--output", "halves.pth")
    halves = read_tensors(tmp_path / "halves.pth")
    for key in merged:  # 0.25 BA + 0.75 BA, rounded once more
        torch.testing.assert_close(halves[key], merged[key], rtol=1e-5, atol=1e-6)
    script("merge_lora.py", "--adapter", adapter, "--weights", "1,2", "--output", "none.pth", status=1)
    tokens = torch.arange(1, 20)[None]
    torch.testing.assert_close(
        load_model(tmp_path / "merged.pth")(tokens)[0], load_tuned(base, adapter)[0](tokens)[0], rtol=1e-4, atol=1e-4
    )  # as above
    answers = [
        script("generate.py", "--model", *model, "--ask", "1?", "--temperature", 0, "--max_tokens", 5).stdout
        for model in (["merged.pth"], [base, "--lora", adapter])
    ]
    assert answers[0] == answers[1]
    dialogue = "hello\n\n/reset\nagain\n/quit\n"
    chat = script("generate.py", "--model", "merged.pth", "--max_tokens", 3, stdin=dialogue, fresh=True)
    assert chat.stdout.count("Assistant:") == 2
    script("finetune.py", "--load_model", "merged.pth", "--data_file", data, "--proj_dir", "full", *TRAINING)
    assert read_manifest(tmp_path / "full/rwkv-0.pth")["kind"] == "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A binidx of questions and answers; converting text would take longer than training on it."""
    prefix, tokenizer = tmp_path_factory.mktemp("data") / "data", WorldTokenizer()
    with writer(prefix) as out:
        for i in range(30):
            out.add([*tokenizer.encode(f"User: {i}?\n\nAssistant: {i}."), 0])
    return prefix


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_end_to_end_later_versions(script, data, tmp_path, version):
    """The version is given once, for the new model, and recognised from then on."""
    new = ["--version", version, "--n_layer", 2, "--n_embd", 16, "--head_size", 16]
    done = script("pretrain.py", "--data_file", data, *new, "--proj_dir", "base", *TRAINING)
    assert f"model: RWKV-{version}, L2 D16" in done.stdout + done.stderr
    base, adapter = tmp_path / "base/rwkv-0.pth", tmp_path / "lora/rwkv-0.pth"
    assert read_manifest(base)["version"] == version
    tune = ["--load_model", base, "--data_file", data, "--proj_dir", "lora", "--lr_init", 1e-2]
    script("lora.py", *tune, "--lora_r", 2, "--lora_parts", "att,ffn,time,ln", *TRAINING)
    done = script("merge_lora.py", "--adapter", adapter, "--output", "merged.pth")
    assert float(re.search(r"largest logit difference .* (\S+) \(", done.stdout)[1]) < 1e-4  # fp32 rounding
    answers = [
        script("generate.py", "--model", *model, "--ask", "1?", "--temperature", 0, "--max_tokens", 5).stdout
        for model in (["merged.pth"], [base, "--lora", adapter])
    ]
    assert answers[0] == answers[1]
    script("finetune.py", "--load_model", "merged.pth", "--data_file", data, "--proj_dir", "full", *TRAINING)
    assert read_manifest(tmp_path / "full/rwkv-0.pth")["version"] == version
    script("export.py", "--model", "merged.pth", "--output", "half.safetensors", "--dtype", "bf16")
    assert version == load_model(tmp_path / "half.safetensors").version.NAME
    rejected = script("export.py", "--model", "merged.pth", "--output", "hf", status=1).stderr
    why = "head" if version == "7" else f"an RWKV-{version} model; a folder can be written of RWKV-4 and 7 only"
    assert why in rejected


def test_upstream_converter_command_and_shards(script, write_jsonl, tmp_path):
    write_jsonl(*({"text": f"{i}"} for i in range(30)), name="sample.jsonl")
    script("convert.py", *"--input ./sample.jsonl --output-prefix ./data/sample --vocab ./rwkv_vocab_v20230424.txt --dataset-impl mmap"
           " --tokenizer-type RWKVTokenizer --append-eod --workers 2".split())  # fmt: skip
    shards = ["--input", "sample.jsonl", "--output-prefix", "parts/sample"]
    for i in range(3):
        script("convert.py", *shards, "--shard", f"{i}/3")
    assert "parts/sample_text_document.bin and .idx: 30 documents" in script("convert.py", *shards, "--merge").stdout
    for end in (".bin", ".idx"):
        one, merged = (tmp_path / f"{folder}/sample_text_document{end}" for folder in ("data", "parts"))
        assert one.read_bytes() == merged.read_bytes()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(script, name):
    text = script(f"{name}.py", "--help", fresh=True).stdout
    assert f"python scripts/{name}.py" in text  # an example command
    assert "--config" in text


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("convert", ["--input", "none.jsonl"], "none.jsonl: no such file"),
        ("convert", [], "--input is missing"),
        ("pretrain", [], "--data_file is missing"),
        ("finetune", ["--data_file", "x"], "--load_model FILE"),
        ("state", ["--data_file", "x"], "state tuning needs a model: pass --load_model FILE"),
        ("dpo", ["--data_file", "x"], "DPO needs a model that answers already: pass --load_model FILE"),
        ("finetune", ["--train_type", "infctx"], "use --tbptt_len"),
        ("lora", ["--data_file", "x"], "LoRA needs a pretrained model"),
        ("merge_lora", [], "--adapter and --output are required"),
        ("inspect_data", [], "--data_file is missing"),
        ("inspect_data", ["--data_file", "none"], "none.idx: no such file"),
        ("generate", [], "--model is missing"),
        ("serve", [], "--model is missing"),
        ("serve", ["--model", "none.pth"], "none.pth: no such checkpoint"),
        ("generate", ["--model", "none.pth"], "none.pth: no such checkpoint"),
    ],
)
def test_missing_flags(script, name, arguments, message):
    result = script(f"{name}.py", *arguments, status=1)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_merge_keeps_dtype_and_existing_file(script, make_base, tmp_path):
    base = make_base()
    half = {key: value.bfloat16() for key, value in read_tensors(base).items()}
    torch.save(half, tmp_path / "half.pth")
    adapter = {"blocks.0.att.key.lora_A": torch.randn(2, 16), "blocks.0.att.key.lora_B": torch.randn(16, 2)}
    adapter |= {
        f"blocks.{i}.att.{m}.lora_{x}": torch.zeros(2, 16) if x == "A" else torch.zeros(16, 2)
        for i in (0, 1)
        for m in ("key", "value", "receptance")
        for x in "AB"
    } | adapter
    torch.save(adapter, tmp_path / "upstream.pth")
    assert (
        "its alpha is unknown"
        in script(
            "merge_lora.py", "--adapter", "upstream.pth", "--base", "half.pth", "--output", "m.pth", status=1
        ).stderr
    )
    assert (
        "names its base" in script("merge_lora.py", "--adapter", "upstream.pth", "--output", "m.pth", status=1).stderr
    )
    script("merge_lora.py", "16", "half.pth", "upstream.pth", "m.pth")
    merged = read_tensors(tmp_path / "m.pth")
    # upstream: W += B @ A · (α / r)
    expected = (
        half["blocks.0.att.key.weight"].float()
        + 8 * adapter["blocks.0.att.key.lora_B"] @ adapter["blocks.0.att.key.lora_A"]
    ).bfloat16()
    assert torch.equal(merged["blocks.0.att.key.weight"], expected)
    assert all(torch.equal(merged[key], half[key]) for key in half if key != "blocks.0.att.key.weight")
    assert "m.pth already exists" in script("merge_lora.py", "16", "half.pth", "upstream.pth", "m.pth", status=1).stderr


def test_generate_with_other_vocabulary(script, make_base):
    assert "not the World vocabulary" in script("generate.py", "--model", make_base(), "--prompt", "x", status=1).stderr
    thoughts = script("generate.py", "--model", "x", "--prompt", "x", "--think", "full", status=1)
    assert "--think is for --ask and chats" in thoughts.stderr


def test_demo_corpus_covers_question_tokens(script, root, tmp_path):
    script("demo_corpus.py", "corpus.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("argparse" in text for text in texts)
    tokenizer = WorldTokenizer()
    known = {token for text in texts for token in tokenizer.encode(text)}
    for line in (root / "data/example.jsonl").read_text(encoding="utf-8").splitlines():
        missing = set(tokenizer.encode(json.loads(line)["text"])) - known
        assert not missing, (line, tokenizer.decode(sorted(missing)))
    assert script("demo_corpus.py", status=1).stderr.startswith("error: expected one argument")


def test_inspect_output_and_exit_status(script, write_jsonl, tmp_path):
    first, second = (
        write_jsonl(*({"text": f"{name} {i}"} for i in range(40)), name=f"{name}.jsonl") for name in ("a", "b")
    )
    script("convert.py", "--input", f"{first},{second}", "--output-prefix", "both")
    flags = ["--data_file", "both_text_document", "--ctx_len", 8]
    result = script("inspect_data.py", *flags, "--verify", f"{first},{second}", fresh=True)
    assert "all 80 documents decode to the source" in result.stdout
    assert (tmp_path / "both_text_document_lengths.png").read_bytes().startswith(b"\x89PNG")
    assert not re.search("warn|deprecat", result.stderr, re.IGNORECASE), result.stderr
    found = json.loads(
        script("inspect_data.py", *flags, "--verify", first, "--json", "--png", "x.png", status=1).stdout
    )
    assert found["documents"] == 80
    assert found["problems"] == ["the source has 40 documents, the data 80"]
    assert (tmp_path / "x.png").exists()
