"""Input files, and what a conversion of them contains."""

import json
from pathlib import Path

from rwkv.config import ConvertConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert.pipeline import convert
from rwkv.data.tokenizer import WorldTokenizer

SCRIPT = Path(__file__).parents[3] / "scripts/convert.py"


def line(text):
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name if name.endswith(".txt") else line(name), encoding="utf-8")


def converted(spec, prefix, **flags):
    flags = {"input": str(spec), "output_prefix": str(prefix), "workers": 1, **flags}
    data = Dataset(convert(ConvertConfig(**flags)).pairs[0][0])
    return [WorldTokenizer().decode(data.document(i)[:-1]) for i in range(len(data))]
