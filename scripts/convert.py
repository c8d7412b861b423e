"""Convert jsonl to binidx, the format that training reads, with the World vocabulary.

    python scripts/convert.py --input mine.jsonl                       # writes mine_text_document.bin and .idx
    python scripts/convert.py --input a.jsonl,b.jsonl --output-prefix data/mine --dtype int32

Every line is one document: {"text": "..."}. A bad line stops the conversion, is named by file and number, and nothing is written.
"""

from pathlib import Path

from rwkv.cli import parse, sentences
from rwkv.config import ConvertConfig
from rwkv.errors import UserError

if __name__ == "__main__":
    with sentences():
        config = parse(ConvertConfig, __doc__)
        inputs = [Path(path.strip()) for path in config.input.split(",") if path.strip()]
        if not inputs:
            raise UserError("--input is missing: one or more .jsonl files, separated by commas")
        from rwkv.data.convert import convert

        done = convert(
            inputs,
            config.output_prefix or str(inputs[0]).removesuffix(".jsonl"),
            key=config.jsonl_keys,
            append_eod=config.append_eod,
            dtype=config.dtype,
            force=config.force,
        )
        print(f"{done.prefix}.bin and .idx: {done.documents:,} documents, {done.tokens:,} tokens. Train with --data_file {done.prefix}")
