"""Fine-tune a model with LoRA: train a small adapter while the model stays frozen.

    python scripts/lora.py --load_model base.pth --data_file mine.jsonl --proj_dir out/lora \\
        --lora_r 8 --lora_alpha 32 --lr_init 1e-4 --lr_final 1e-4 \\
        --epoch_count 1 --epoch_steps 1000 --micro_bsz 1

Then merge the adapter into the model, or use it directly:

    python scripts/merge_lora.py --adapter out/lora/rwkv-0.pth --output merged.pth
    python scripts/generate.py --model base.pth --lora out/lora/rwkv-0.pth
"""

from rwkv.cli import parse, report_errors
from rwkv.config import LoRAConfig

if __name__ == "__main__":
    with report_errors():
        config = parse(LoRAConfig, __doc__)
        from rwkv.train.fit import run  # after parsing, so that --help does not import torch

        run(config)
