"""Preference tuning (DPO): train on pairs of a chosen and a rejected answer to the same prompt.

    # records with prompt, chosen and rejected: texts, or lists of messages
    python scripts/convert.py --input pairs.jsonl --output-prefix out/pairs
    python scripts/dpo.py --load_model chat.pth --data_file out/pairs_text_document \\
        --proj_dir out/dpo --ctx_len 1024 --micro_bsz 4 --epoch_count 1 --epoch_steps 500

Start from a model that answers already, such as one tuned with scripts/lora.py and merged. The
result is a LoRA adapter, as from scripts/lora.py; --lora false trains all weights, with a lower
default learning rate. The reference model is the one that the run starts from; it takes no
additional memory. scripts/lora.py, finetune.py and state.py with --objective dpo do the same with
their defaults.
"""

import sys

from rwkv.arguments import value
from rwkv.cli import parse, report_errors
from rwkv.config import DPOConfig, FullDPOConfig
from rwkv.errors import UserError

if __name__ == "__main__":
    with report_errors():
        full = value(sys.argv[1:], DPOConfig, "lora") == "false"
        config = parse(FullDPOConfig if full else DPOConfig, __doc__)
        if not config.load_model:
            raise UserError("DPO needs a model that answers already: pass --load_model FILE")
        from rwkv.train.fit import run  # after parsing, so that --help does not import torch

        run(config)
