"""Fine-tune all weights of a model (full fine-tuning).

    python scripts/finetune.py --load_model base.pth --data_file mine.jsonl --proj_dir out/tuned \\
        --lr_init 1e-5 --lr_final 1e-5

Model sizes are read from the checkpoint. For LoRA, which needs less memory, see scripts/lora.py.
"""

from rwkv.cli import parse, report_errors
from rwkv.config import TrainConfig
from rwkv.errors import UserError

if __name__ == "__main__":
    with report_errors():
        config = parse(TrainConfig, __doc__)
        if not config.load_model and not config.my_pile_stage:  # the stages find it in proj_dir
            raise UserError(
                "full fine-tuning needs a model: pass --load_model FILE; scripts/pretrain.py trains a new one"
            )
        from rwkv.train.fit import run  # after parsing, so that --help does not import torch

        run(config)
