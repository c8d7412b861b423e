"""Check a binidx before training: its contents, the length of an epoch, and problems.

    python scripts/inspect_data.py --data_file mine_text_document --ctx_len 1024 --micro_bsz 12
    # verify that it decodes to the source
    python scripts/inspect_data.py --data_file mine_text_document --verify mine.jsonl

Exits with status 1 if there is a problem. --json prints the findings as JSON.
"""

import dataclasses
import json
import sys
from pathlib import Path

from rwkv.cli import parse, report_errors
from rwkv.config import InspectConfig
from rwkv.errors import UserError


def main(config: InspectConfig) -> int:
    import numpy as np

    from rwkv.data import histogram, inspection, provenance
    from rwkv.data.binidx import Dataset
    from rwkv.data.convert.pipeline import texts
    from rwkv.data.tokenizer import HFTokenizer

    if not config.data_file:
        raise UserError("--data_file is missing: the binidx to inspect, P for P.bin and P.idx")
    for name in ("ctx_len", "micro_bsz"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} must be at least 1; it is {getattr(config, name)}")
    data = Dataset(config.data_file)
    vocab_file = config.vocab_file or provenance.tokenizer_file(data)
    tokenizer = HFTokenizer(vocab_file) if vocab_file else None
    found = inspection.inspect(data, config.ctx_len, config.micro_bsz, max(0, config.samples), tokenizer)
    if config.verify:
        names = ("jsonl_keys", "split_lines", "ftfy", "format", "chat_template", "mask", "on_error")
        given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(InspectConfig, name)}
        given |= {"vocab_file": vocab_file, "tokenizer_type": "HFTokenizer" if tokenizer else "RWKVTokenizer"}
        source = provenance.convert_config(found.manifest, config.verify, given)
        inspection.verify(data, *texts(source), found, tokenizer)
    image = Path(config.png or f"{data.prefix}_lengths.png")
    histogram.draw(np.array(found.lengths), image, data.prefix.name, config.ctx_len)
    if config.json:
        print(json.dumps(dataclasses.asdict(found) | {"png": str(image)}, ensure_ascii=False, indent=2))
    else:
        print(inspection.format_report(found))
        print(f"plot:       {image}")
    return 1 if found.problems else 0


if __name__ == "__main__":
    with report_errors():
        sys.exit(main(parse(InspectConfig, __doc__)))
