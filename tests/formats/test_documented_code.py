"""The Python code of docs/export.md gives our answer, in the packages that it names."""

import re

import pytest
import torch

from rwkv import checkpoint
from rwkv.config import ExportConfig
from rwkv.data.tokenizer import WorldTokenizer
from tests.formats.oracle import ask, script_main
from tests.oracle import needs_oracle

PROMPT = "User: What is LoRA?\n\nAssistant:"
# torch 1.13's load has no mmap
BEFORE = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
sys.modules.pop("rwkv_tokenizer", None)  # PyPI's rwkv has a module of this name
if torch.__version__.startswith("1."):
    load = torch.load
    torch.load = lambda *a, mmap=None, **k: load(*a, **k)
"""


def greedy(model, stop) -> str:
    ids, written, state = WorldTokenizer().encode(PROMPT), [], None
    with torch.no_grad():
        while len(written) < 40:
            logits, state = model(torch.tensor([ids]), state)
            if (token := int(logits[0, -1].argmax())) in stop:
                break
            written.append(token)
            ids = [token]
    return WorldTokenizer().decode_bytes(written).decode()


@needs_oracle
@pytest.mark.parametrize(
    ("package", "output", "stop"), [("rwkv7_hf", "out/small-hf", [0]), ("rwkv", "out/small-fp16.pth", [0, 261])]
)
def test_code_of_the_page_chats(model_file, root, tmp_path, package, output, stop):
    page = (root / "docs/export.md").read_text(encoding="utf-8")
    codes = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    code = next(code for code in codes if f"from {package}" in code and output.removesuffix(".pth") in code)
    base = model_file("7", n_layer=1, n_embd=64, vocab_size=65536)
    (tmp_path / "out").mkdir()
    # fp32 instead of the page's dtypes, so that the answers are equal
    script_main()(ExportConfig(model=str(base), output=str(tmp_path / output), check_tokens=0))
    assert code.count("\nprint(") == 1
    program = code.replace("\nprint(", "\nanswer = (").replace('"out/', f'"{tmp_path}/out/')
    answer = ask(BEFORE + program + "\nprint()\nprint(json.dumps(answer))")
    assert answer == greedy(checkpoint.load_model(base).eval(), stop)
    assert len(answer) > 5
