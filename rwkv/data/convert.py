"""jsonl → tokens → binidx."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rwkv.data import binidx, jsonl
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError

_BATCH = 1000  # documents tokenised at once


@dataclass(frozen=True)
class Converted:
    """What a conversion made."""

    prefix: str
    documents: int
    tokens: int


def document_prefix(output_prefix: str | Path, key: str) -> str:
    """Upstream's name for the pair of files: `P_text_document`."""
    return f"{output_prefix}_{key}_document"


def convert(
    inputs: list[Path], output_prefix: str | Path, *, key: str = "text", append_eod: bool = True, dtype: str = "uint16", force: bool = False
) -> Converted:
    """Tokenise jsonl files with the World vocabulary into `P_<key>_document.bin` and `.idx`.

    Raises:
        UserError: a bad line (by file and number), or output that is there already and no `force`. Nothing is written then.
    """
    prefix = document_prefix(output_prefix, key)
    if not force and (there := [name for name in (f"{prefix}.bin", f"{prefix}.idx") if Path(name).exists()]):
        raise UserError(f"{' and '.join(there)} exist already; give --force to replace them, or another --output-prefix")
    if missing := [str(path) for path in inputs if not path.is_file()]:
        raise UserError(f"{', '.join(missing)}: no such file")
    tokenizer = WorldTokenizer()
    total = sum(path.stat().st_size for path in inputs)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="convert", mininterval=0.5 if sys.stderr.isatty() else 15) as bar,
        binidx.writer(prefix, dtype) as out,
    ):
        for texts in _batches(inputs, key, bar):
            for ids in tokenizer.encode_batch(texts):
                out.add([*ids, tokenizer.eod] if append_eod else ids)
            bar.set_postfix_str(f"{len(out.sizes)} documents, {out.tokens} tokens")
    return Converted(prefix, len(out.sizes), out.tokens)


def _batches(inputs: list[Path], key: str, bar: tqdm) -> Iterator[list[str]]:
    texts: list[str] = []
    for path in inputs:
        before = 0
        for text, done in jsonl.documents(path, key):
            bar.update(done - before)
            before = done
            texts.append(text)
            if len(texts) == _BATCH:
                yield texts
                texts = []
    if texts:
        yield texts
