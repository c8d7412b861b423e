"""Write the pretraining corpus of the demo.

    python scripts/demo_corpus.py out/demo/corpus.jsonl

The docstrings of some modules of Python's standard library, one document per module, and
data/demo.md several times. Real pretraining needs gigabytes; this is enough to see the loss fall.
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rwkv.cli import report_errors
from rwkv.errors import UserError
from rwkv.files import atomic_write

MODULES = """argparse collections/__init__ csv dataclasses datetime difflib functools heapq inspect json/__init__
    logging/__init__ pathlib random shutil statistics string textwrap threading typing zipfile""".split()
REPEATS = 16  # of data/demo.md, whose tokens would otherwise be too rare to learn


def docstrings(path: Path) -> str:
    """Docstrings of more than 40 characters in a Python file, separated by blank lines."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    texts = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
    return "\n\n".join(text for text in texts if text and len(text) > 40)


def corpus() -> Iterator[str]:
    """The documents, in a fixed order."""
    library, project = Path(sysconfig.get_path("stdlib")), Path(__file__).parents[1]
    for module in MODULES:
        if (path := library / f"{module}.py").is_file():
            yield docstrings(path)
    yield from [(project / "data/demo.md").read_text(encoding="utf-8")] * REPEATS


if __name__ == "__main__":
    with report_errors():
        if {"-h", "--help"} & set(sys.argv):
            print(__doc__)
            sys.exit()
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            raise UserError(f"expected one argument, the file to write.\n{__doc__}")
        texts = list(corpus())
        with atomic_write(sys.argv[1]) as temporary:
            temporary.write_text(
                "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
            )
        print(f"{sys.argv[1]}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} million characters")
