"""Fine-tune all weights of a model (full fine-tuning).

    python scripts/finetune.py --load_model base.pth --data_file mine.jsonl --proj_dir out/tuned \\
        --lr_init 1e-5 --lr_final 1e-5
    # state tuning, as scripts/state.py
    python scripts/finetune.py --train_type state --load_model base.pth --data_file mine.jsonl

Model sizes are read from the checkpoint. For LoRA, which needs less memory, see scripts/lora.py.
"""

import sys

from rwkv.arguments import value
from rwkv.cli import parse, report_errors
from rwkv.config import FinetuneConfig, StateConfig
from rwkv.errors import UserError

if __name__ == "__main__":
    with report_errors():
        tunes_state = value(sys.argv[1:], FinetuneConfig, "train_type") == "state"
        config = parse(StateConfig if tunes_state else FinetuneConfig, __doc__)
        if not config.load_model and not config.my_pile_stage:  # the stages find it in proj_dir
            raise UserError(
                "full fine-tuning needs a model: pass --load_model FILE; scripts/pretrain.py trains a new one"
            )
        from rwkv.train.fit import run  # after parsing, so that --help does not import torch

        run(config)
