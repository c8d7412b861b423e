"""llama.cpp itself (PyPI's xllamacpp) reads our GGUF files, and gives the same probabilities."""

from pathlib import Path

import pytest
import torch

from rwkv import checkpoint, export
from rwkv.config import ExportConfig
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError
from rwkv.formats import gguf, gguf_file
from rwkv.models.rwkv import shapes
from tests.formats.oracle import ask, script_main
from tests.oracle import needs_oracle

PROMPT = list(b"RWKV is an")
LLAMA_CPP = """
import json, sys
sys.path.insert(0, sys.argv[1])
import xllamacpp
found = []
for file, prompt in json.loads(sys.argv[2]):
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = file, 256, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    request = {"n_predict": 1, "max_tokens": 1, "temperature": 0}
    if isinstance(prompt, list) and isinstance(prompt[0], dict):
        chat = {"messages": prompt, "logprobs": True, "top_logprobs": 10}
        answer = server.handle_chat_completions({**request, **chat})
    else:
        answer = server.handle_completions({**request, "prompt": prompt, "logprobs": 10, "n_probs": 10})
    likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found.append([[entry["id"], entry["logprob"]] for entry in likeliest])
    del server
print(json.dumps(found))
"""
# Of log-probabilities. llama.cpp rounds the inputs of matmuls to the dtype of the matrix.
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2, "q8_0": 6e-2}


@needs_oracle
@pytest.mark.parametrize("version", ["6", "7"])
def test_llama_cpp_gives_our_log_probabilities(model_file, tmp_path, capsys, version):
    prompt, files, expected = [byte + 1 for byte in PROMPT], [], []
    for trained in (False, True):
        base = model_file(version, trained)
        for dtype in TOLERANCES:
            files.append(str(tmp_path / f"{trained}-{dtype}.gguf"))
            script_main()(ExportConfig(model=str(base), output=files[-1], dtype=dtype, check_tokens=16))
            assert "largest difference from" in capsys.readouterr().out
            source = export.open_source(base)
            lazy = gguf.restore(gguf_file.read(Path(files[-1])), shapes(source.sizes))
            written = {name: tensor.make() for name, tensor in lazy.items()}
            with torch.no_grad():
                logits = checkpoint.load_model(files[-1], tensors=written)(torch.tensor([prompt]))[0]
            expected.append((dtype, logits[0, -1].log_softmax(-1)))
    for (dtype, ours), likeliest in zip(expected, ask(LLAMA_CPP, [[file, prompt] for file in files]), strict=True):
        assert len(likeliest) == 10
        ids, theirs = [i for i, _ in likeliest], torch.tensor([x for _, x in likeliest])
        torch.testing.assert_close(ours[ids], theirs, rtol=0, atol=TOLERANCES[dtype])
        if dtype == "fp32":
            assert ours.topk(10).indices.tolist() == ids


@needs_oracle
def test_llama_cpp_tokenizes_as_world(model_file, tmp_path):
    """The likeliest tokens after a text, or a chat, depend on all of its tokens."""
    base = model_file("7", n_layer=1, n_embd=64, vocab_size=65536)
    output = tmp_path / "world.gguf"
    script_main()(ExportConfig(model=str(base), output=str(output), dtype="fp32", check_tokens=0))
    text = "Hello, RWKV!\n\nUser: \\x41 'quotes\" and\ttabs; 你好，世界 😀" + "a" * 50 + " " * 20 + "."
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi\n\n\n\nthere\n"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "你好"},
    ]
    texts = [text, "System: Be brief.\n\nUser: Hi\nthere\n\nAssistant: Hello\n\nUser: 你好\n\nAssistant:"]
    model = checkpoint.load_model(base)
    for given, likeliest in zip(texts, ask(LLAMA_CPP, [[str(output), text], [str(output), chat]]), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([WorldTokenizer().encode(given)]))[0]
        ours = logits[0, -1].log_softmax(-1)
        ids, theirs = [i for i, _ in likeliest], torch.tensor([x for _, x in likeliest])
        assert ours.topk(10).indices.tolist() == ids
        torch.testing.assert_close(ours[ids], theirs, rtol=0, atol=1e-3)  # they add 65,536 terms in fp32


def test_rows_that_q8_0_cannot_hold_are_fp16(model_file, tmp_path):
    base = model_file("7", rank_a=24)
    source = export.open_source(base)
    found = export.export_file(source, tmp_path / "x.gguf", "gguf", "q8_0", 8, {})
    assert found.dtypes == ["F16", "F32", "Q8_0"]
    assert found.weights < 0.01
    assert found.logits < 0.2


def test_versions_and_vocabularies_without_gguf(model_file, make_base, tmp_path):
    for version in ("4", "5.2"):
        with pytest.raises(UserError, match=rf"an RWKV-{version} model; llama.cpp has only RWKV-6 and 7"):
            export.export_file(export.open_source(model_file(version)), tmp_path / "x.gguf", "gguf", "fp32", 8, {})
    pile = make_base(version="7", n_layer=1, vocab_size=50304)
    with pytest.raises(UserError, match="its tokenizer is 20B"):
        export.export_file(export.open_source(pile), tmp_path / "x.gguf", "gguf", "fp32", 8, {})
    assert not list(tmp_path.glob("*.gguf"))


def test_overflow_in_q8_0(make_model, tmp_path):
    model = make_model(version="7", n_embd=32)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e8
    checkpoint.save_model(tmp_path / "large.pth", model, {})
    with pytest.raises(UserError, match=r"output.weight is not finite in Q8_0; use --dtype bf16 or fp32"):
        export.export_file(export.open_source(tmp_path / "large.pth"), tmp_path / "x.gguf", "gguf", "q8_0", 0, {})
    assert not (tmp_path / "x.gguf").exists()
