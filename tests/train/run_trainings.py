"""Run several trainings in the processes of distributed runs: python run_trainings.py STEP
(TRAININGS.json WORLD_SIZE PORT)..., which prints into TRAININGS<rank>.txt beside the file.

The trainings share the processes, and the processes are forked, as starting Python and importing
torch and DeepSpeed takes longer than training. The file contains [kind, flags] of each training.
Extra flags: `copy_of`, a run whose copy, as it was after STEP, is continued; `gradient_factor`,
[step, value], which multiplies a gradient of that step by the value; such a run may end with a
UserError, which is written to error.txt; `count_waits`, [first, last], the steps in which waits for
the device are counted (last excluded). Trainings with DeepSpeed also write facts.json
(RecordingStrategy).
"""

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from multiprocessing import connection
from pathlib import Path

import pytest
import torch.distributed as dist

from rwkv import compat
from rwkv.config import DPOConfig, LoRAConfig, StateConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.train import fit as training
from rwkv.train import resolve
from rwkv.train.callbacks import metrics
from rwkv.train.resume import state_files
from rwkv.train.runtime import strategy
from rwkv.train.runtime.lightning import rank_zero_only
from tests.train import host_sync
from tests.train.host_sync import FakeDevice


class RecordingStrategy(strategy.ZeroStrategy):
    """Write facts.json. `weights`, `masters`: dtypes of the parameters and of the optimizer's
    master weights; `bucket`: elements; `moved`: devices of the model before the optimizer was
    created; `gathered`: parameters gathered for a full pass; `timed`: micro-batches timed;
    `tensors`: trained parameters; `waits`: see host_sync.FakeDevice.
    """

    gradient_factor: list | None = None
    device: FakeDevice | None = None  # counts waits

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
            "tensors": sum(p.requires_grad for p in module.parameters()),
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
            self.facts["waits"] = self.device.waits if self.device else {}
            (Path(self.lightning_module.config.proj_dir) / "facts.json").write_text(json.dumps(self.facts))
        super().teardown()


check = resolve.check


def copy_after_step(step: int, source: str, copy: str) -> None:
    """Copy a completed run, as if it had been killed after saving the state of a step."""
    shutil.copytree(source, copy)
    for path in [*state_files.states(Path(copy)), *Path(copy).glob("rwkv-0.pth*")]:
        if path.name != f"step-{step}.pt":
            path.unlink()


def train(kind: str, flags: dict, step: int) -> None:
    if source := flags.pop("copy_of", None):
        if rank_zero_only.rank == 0:
            copy_after_step(step, source, flags["proj_dir"])
        dist.barrier()  # the process group of an earlier training
    RecordingStrategy.gradient_factor = flags.pop("gradient_factor", None)
    counted = flags.pop("count_waits", None)
    resolve.check = (lambda _: None) if flags["precision"] == "fp16" else check  # check requires a GPU for fp16
    if flags["precision"] == "fp16" and compat.stack() == "modern":
        compat.import_deepspeed(on_gpu=False)
        accelerator = type(importlib.import_module("deepspeed.accelerator").get_accelerator())
        accelerator.is_fp16_supported = lambda _: True  # as a GPU; this torch supports fp16 on CPUs
    config = {"full": TrainConfig, "lora": LoRAConfig, "state": StateConfig, "dpo": DPOConfig}[kind](**flags)
    try:
        with _waits_counted(*counted) if counted else contextlib.nullcontext():
            training.fit(config)
    except UserError as error:
        if not RecordingStrategy.gradient_factor:
            raise
        (Path(config.proj_dir) / "error.txt").write_text(str(error))


@contextlib.contextmanager
def _waits_counted(first: int, last: int):
    fake = RecordingStrategy.device = FakeDevice(count=True)
    with pytest.MonkeyPatch.context() as patch:
        host_sync.use(patch, fake, first, last)
        if cuda := sys.modules.get("cuda_on_cpu"):
            patch.setattr(cuda, "waits_on", fake)
        yield
    RecordingStrategy.device = None


def prepare() -> None:
    """Import DeepSpeed, and patch what the processes share."""
    if compat.stack() == "cu117":
        importlib.import_module("cuda_on_cpu").install()
    else:
        compat.import_deepspeed(on_gpu=False)
        with contextlib.suppress(ImportError):  # imported by the first training, with all of torch's compiler
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    gc.collect()
    gc.freeze()  # ZeRO-3 collects garbage five times a run, which otherwise takes most of its time
    strategy.ZeroStrategy = RecordingStrategy
    metrics.plot = lambda curve, image, title, unit: None  # drawing takes longer than training


def run(step: int, file: Path, world_size: int, port: str, rank: int) -> None:
    """All trainings of a file, as one rank."""
    with open(file.with_name(f"{file.stem}{rank}.txt"), "w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    size, rank_zero_only.rank = str(world_size), rank  # Lightning reads the rank when it is imported
    os.environ.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=port)
    os.environ.update(GROUP_RANK="0", NODE_RANK="0")
    leave, strategy.leave_process_group = strategy.leave_process_group, lambda: None  # shared by all trainings
    for kind, flags in json.loads(file.read_text()):
        train(kind, flags, step)
    leave()


if __name__ == "__main__":
    prepare()
    step, *words = sys.argv[1:]
    ranks = [
        multiprocessing.get_context("fork").Process(
            target=run, args=(int(step), Path(file), int(size), port, rank), daemon=True
        )
        for file, size, port in zip(words[::3], words[1::3], words[2::3], strict=True)
        for rank in range(int(size))
    ]
    for process in ranks:
        process.start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the ranks, which are daemons
    running = {process.sentinel: process for process in ranks}
    while running:
        for ended in connection.wait(running):
            process = running.pop(ended)
            process.join()  # the sentinel is ready before the exit code
            if process.exitcode:  # its peers would wait for it
                sys.exit(1)
