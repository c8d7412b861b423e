"""Trainings one after another in one process of several: python ranks.py TRAININGS.json, with RANK, WORLD_SIZE and so on set as torchrun sets them.

Starting processes and importing torch takes longer than these trainings, so they share both. The file holds [kind, flags] of each; a flag `spoil`, [step,
value], multiplies a gradient of that step by the value, and such a run may end with a UserError, which error.txt then holds. Beside what a training under
DeepSpeed leaves, facts.json says what it was like inside.
"""

import importlib
import json
import sys
from pathlib import Path

import cuda_on_cpu

from rwkv import compat
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.train import fit as training
from rwkv.train import resolve
from rwkv.train.runtime import strategy


class Watched(strategy.ZeroStrategy):
    """Writes facts.json. `weights`, `masters`: dtypes of what is computed with, and of what the optimizer steps on; `bucket`: elements; `moved`: where the
    model went before the optimizer was made; `gathered`: parameters that are gathered for a whole pass; `timed`: micro-batches that were timed."""

    spoil: list | None = None

    def init_deepspeed(self) -> None:
        module, moved = self.lightning_module, []
        move = module.to
        module.to = lambda *arguments, **options: moved.append(str(arguments[0])) or move(*arguments, **options)
        super().init_deepspeed()
        del module.to
        engine = self.deepspeed_engine
        zero = engine.optimizer
        masters = getattr(zero, "fp32_partitioned_groups_flat", None) or getattr(
            zero, "single_partition_of_fp32_groups", []
        )  # stage 3; 1 and 2
        self.facts = {
            "weights": sorted({str(getattr(p, "ds_tensor", p).dtype) for p in engine.module.parameters()}),
            "masters": sorted({str(part.dtype) for part in masters}),
            "bucket": zero.reduce_bucket_size,
            "moved": moved,
            "gathered": 0,
        }
        if self.spoil:
            step, value = self.spoil
            trained = [p for p in module.parameters() if p.requires_grad]
            trained[-1].register_hook(lambda gradient: gradient * value if module.step + 1 == step else gradient)

    def backward(self, *arguments, **keywords):
        self.facts["gathered"] += sum(
            len(m._external_params) for m in self.model.modules() if hasattr(m, "_external_params")
        )
        return super().backward(*arguments, **keywords)

    def teardown(self) -> None:
        if self.is_global_zero and hasattr(self, "facts"):
            timer = self.deepspeed_engine.tput_timer
            self.facts["timed"] = (
                timer.total_step_count if hasattr(timer, "total_step_count") else timer.global_step_count
            )
            (Path(self.lightning_module.config.proj_dir) / "facts.json").write_text(json.dumps(self.facts))
        super().teardown()


check = resolve.check


def train(kind: str, flags: dict) -> None:
    Watched.spoil = flags.pop("spoil", None)
    resolve.check = (lambda _: None) if flags["precision"] == "fp16" else check  # which asks for a GPU
    if flags["precision"] == "fp16" and compat.stack() == "modern":
        compat.import_deepspeed(on_gpu=False)
        accelerator = type(importlib.import_module("deepspeed.accelerator").get_accelerator())
        accelerator.is_fp16_supported = lambda _: True  # as a GPU; this torch computes in fp16 on a CPU
    config = {"full": TrainConfig, "lora": LoRAConfig}[kind](**flags)
    try:
        training.fit(config)
    except UserError as error:
        if not Watched.spoil:
            raise
        (Path(config.proj_dir) / "error.txt").write_text(str(error))


if __name__ == "__main__":
    if compat.stack() == "cu117":
        cuda_on_cpu.install()
    strategy.ZeroStrategy = Watched
    leave, strategy.leave_process_group = strategy.leave_process_group, lambda: None  # one connection for all of them
    for kind, flags in json.loads(Path(sys.argv[1]).read_text()):
        train(kind, flags)
    leave()
