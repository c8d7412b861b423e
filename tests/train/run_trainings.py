"""Run several trainings in one process of a distributed run: python run_trainings.py
TRAININGS.json, with RANK, WORLD_SIZE etc. set as by torchrun.

The trainings share the processes, as starting Python and importing torch takes longer than
training. The file contains [kind, flags] of each training. The extra flag `gradient_factor`,
[step, value], multiplies a gradient of that step by the value; such a run may end with a UserError,
which is written to error.txt. Trainings with DeepSpeed also write facts.json (RecordingStrategy).
"""

import gc
import importlib
import json
import sys
from pathlib import Path

import cuda_on_cpu

from rwkv import compat
from rwkv.config import DPOConfig, LoRAConfig, StateConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.train import fit as training
from rwkv.train import resolve
from rwkv.train.callbacks import metrics
from rwkv.train.runtime import strategy


class RecordingStrategy(strategy.ZeroStrategy):
    """Write facts.json. `weights`, `masters`: dtypes of the parameters and of the optimizer's
    master weights; `bucket`: elements; `moved`: devices of the model before the optimizer was
    created; `gathered`: parameters gathered for a full pass; `timed`: micro-batches timed.
    """

    gradient_factor: list | None = None

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
        )  # stage 3; stages 1 and 2
        self.facts = {
            "weights": sorted({str(getattr(p, "ds_tensor", p).dtype) for p in engine.module.parameters()}),
            "masters": sorted({str(part.dtype) for part in masters}),
            "bucket": zero.reduce_bucket_size,
            "moved": moved,
            "gathered": 0,
        }
        if self.gradient_factor:
            step, value = self.gradient_factor
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
    RecordingStrategy.gradient_factor = flags.pop("gradient_factor", None)
    resolve.check = (lambda _: None) if flags["precision"] == "fp16" else check  # check requires a GPU for fp16
    if flags["precision"] == "fp16" and compat.stack() == "modern":
        compat.import_deepspeed(on_gpu=False)
        accelerator = type(importlib.import_module("deepspeed.accelerator").get_accelerator())
        accelerator.is_fp16_supported = lambda _: True  # as a GPU; this torch supports fp16 on CPUs
    config = {"full": TrainConfig, "lora": LoRAConfig, "state": StateConfig, "dpo": DPOConfig}[kind](**flags)
    try:
        training.fit(config)
    except UserError as error:
        if not RecordingStrategy.gradient_factor:
            raise
        (Path(config.proj_dir) / "error.txt").write_text(str(error))


if __name__ == "__main__":
    if compat.stack() == "cu117":
        cuda_on_cpu.install()
    else:
        compat.import_deepspeed(on_gpu=False)
    gc.collect()
    gc.freeze()  # ZeRO-3 collects garbage five times a run, which otherwise takes most of its time
    strategy.ZeroStrategy = RecordingStrategy
    metrics.plot = lambda curve, image, title, unit: None  # drawing takes longer than training
    leave, strategy.leave_process_group = strategy.leave_process_group, lambda: None  # shared by all trainings
    for kind, flags in json.loads(Path(sys.argv[1]).read_text()):
        train(kind, flags)
    leave()
