"""Trainings one after another in one process of several: python ranks.py TRAININGS.json, with RANK, WORLD_SIZE and so on set as torchrun sets them.

Starting processes and importing torch takes longer than these trainings, so they share both. The file holds [kind, flags] of each. Beside what a
training under DeepSpeed leaves, dtypes.json says what its weights are kept in, and what the optimizer steps on.
"""

import json
import sys
from pathlib import Path

from rwkv.config import LoRAConfig, TrainConfig
from rwkv.train import strategy
from rwkv.train.fit import fit


class Watched(strategy.ZeroStrategy):
    def init_deepspeed(self) -> None:
        super().init_deepspeed()
        module, zero = self.deepspeed_engine.module, self.deepspeed_engine.optimizer
        masters = getattr(zero, "fp32_partitioned_groups_flat", None) or getattr(
            zero, "single_partition_of_fp32_groups", []
        )  # stage 3; 1 and 2
        found = {
            "weights": sorted({str(getattr(p, "ds_tensor", p).dtype) for p in module.parameters()}),
            "masters": sorted({str(part.dtype) for part in masters}),
        }
        if self.is_global_zero:
            (Path(self.lightning_module.config.proj_dir) / "dtypes.json").write_text(json.dumps(found))


if __name__ == "__main__":
    strategy.ZeroStrategy = Watched
    for kind, flags in json.loads(Path(sys.argv[1]).read_text()):
        fit({"full": TrainConfig, "lora": LoRAConfig}[kind](**flags))
