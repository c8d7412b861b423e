"""Pretrain a new model, or continue from --load_model.

    python scripts/pretrain.py --data_file text.jsonl --n_layer 12 --n_embd 768 --proj_dir out/base

--data_file is a .jsonl file or a binidx from scripts/convert.py. The run ends after --epoch_count
epochs or --max_steps steps.
"""

from rwkv.cli import parse, report_errors
from rwkv.config import TrainConfig

if __name__ == "__main__":
    with report_errors():
        config = parse(TrainConfig, __doc__)
        from rwkv.train.fit import run  # after parsing, so that --help does not import torch

        run(config)
