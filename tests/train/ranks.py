"""Trainings one after another in one process of several: python ranks.py TRAININGS.json, with RANK, WORLD_SIZE and so on set as torchrun sets them.

Starting processes and importing torch takes longer than these trainings, so they share both. The file holds [kind, flags] of each.
"""

import json
import sys
from pathlib import Path

from rwkv.config import LoRAConfig, TrainConfig
from rwkv.train.fit import fit

if __name__ == "__main__":
    for kind, flags in json.loads(Path(sys.argv[1]).read_text()):
        fit({"full": TrainConfig, "lora": LoRAConfig}[kind](**flags))
