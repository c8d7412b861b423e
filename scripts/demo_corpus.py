"""Make a pretraining corpus out of text that every machine with Python has: the docstrings of its standard library.

    python scripts/demo_corpus.py out/demo/corpus.jsonl

One document per module: its docstrings, joined. This repository's own README files are added, for some Chinese. Real
pretraining wants gigabytes; this is enough to see a loss fall.
"""

import ast
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rwkv.cli import sentences
from rwkv.errors import UserError
from rwkv.files import whole

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}


def docstrings(source: str) -> Iterator[str]:
    """Every docstring in a module's source, longer than a line of code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                yield inspect.cleandoc(text)


def corpus() -> Iterator[str]:
    """One text per module, and the repository's own pages."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(library).parts):
            text = "\n\n".join(docstrings(path.read_text(encoding="utf-8", errors="replace")))
            if text:
                yield text
    for path in sorted(Path(__file__).parents[1].glob("*.md")):
        yield path.read_text(encoding="utf-8")


if __name__ == "__main__":
    with sentences():
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            raise UserError(f"usage: python scripts/demo_corpus.py OUTPUT.jsonl\n{__doc__}")
        with whole(sys.argv[1]) as temporary, open(temporary, "w", encoding="utf-8") as file:
            texts = list(corpus())
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        print(f"{sys.argv[1]}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} million characters")
