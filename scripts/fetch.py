"""Fetch a published model from the Hugging Face Hub, and verify it.

    python scripts/fetch.py --list
    python scripts/fetch.py --model rwkv7-g1-0.4b
    # a mirror, e.g. in China
    HF_ENDPOINT=https://hf-mirror.com python scripts/fetch.py --model rwkv7-g1-0.4b
    python scripts/fetch.py --model rwkv7-g1a-0.1b-20250728-ctx4096.pth

The model is stored in models/ under its own name, and linked as models/rwkv7-g1-0.4b.pth. Run the
same command again to continue an interrupted download.
"""

import os

from rwkv.cli import parse, report_errors
from rwkv.commands import command
from rwkv.config import FetchConfig
from rwkv.errors import printable


def main(config: FetchConfig) -> None:
    from rwkv.hub import known
    from rwkv.hub.fetch import fetch

    if config.list or not config.model:
        print(known.table())
        print(
            "\nGB to train: on a GPU at ctx_len 1024, micro_bsz 1, bf16, grad_cp 1. The pile models have the 20B vocabulary."
        )
        print(printable(f"fetch one: {command('model', '--model', 'rwkv7-g1-0.4b')}"))
        return
    path = fetch(config)
    print(printable(f"done: {path}; to try it: {command('generate', '--model', path)}"))


if __name__ == "__main__":
    with report_errors():
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read when huggingface_hub is imported
        if not os.environ.get("HF_ENDPOINT"):
            os.environ.pop("HF_ENDPOINT", None)  # compose sets it to ""; huggingface_hub fails on that
        main(parse(FetchConfig, __doc__))
