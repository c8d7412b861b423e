"""State tuning: train only the state with which a model begins a document; its weights stay frozen.

    python scripts/state.py --load_model base.pth --data_file mine.jsonl --proj_dir out/state \\
        --doc_training 1 --lr_init 1 --lr_final 0.01 \\
        --epoch_count 1 --epoch_steps 1000 --micro_bsz 1

The result is a small file, which RWKV-PEFT and PyPI's rwkv read too (att.time_state). Use it beside
the model, or write both into one file:

    python scripts/generate.py --model base.pth --state out/state/rwkv-0.pth
    python scripts/merge_lora.py --adapter out/state/rwkv-0.pth --output merged.pth

scripts/finetune.py --train_type state does the same.
"""

import sys

from rwkv.arguments import value
from rwkv.cli import parse, report_errors
from rwkv.config import FinetuneConfig, StateConfig
from rwkv.errors import UserError

if __name__ == "__main__":
    with report_errors():
        # all weights are not trained with the defaults of a state, such as its learning rate
        tunes_weights = value(sys.argv[1:], StateConfig, "train_type") == "none"
        config = parse(FinetuneConfig if tunes_weights else StateConfig, __doc__)
        if not config.load_model:
            raise UserError("state tuning needs a model: pass --load_model FILE")
        from rwkv.train.fit import run  # after parsing, so that --help does not import torch

        run(config)
