"""Tune all weights of an RWKV-4 model ("full tuning").

    python scripts/finetune.py --load_model base.pth --data_file mine.jsonl --proj_dir out/tuned --lr_init 1e-5 --lr_final 1e-5

Sizes come from the checkpoint. For an adapter that needs less memory see scripts/lora.py.
"""

from rwkv.cli import parse, sentences
from rwkv.config import TrainConfig
from rwkv.errors import UserError

if __name__ == "__main__":
    with sentences():
        config = parse(TrainConfig, __doc__)
        if not config.load_model and not config.my_pile_stage:  # a stage finds it in proj_dir
            raise UserError(
                "tuning needs a model to start from: --load_model FILE; scripts/pretrain.py trains a new one"
            )
        from rwkv.train.fit import run  # after parsing: --help need not wait for torch

        run(config)
