"""Parallel strategies: a single device, DDP, or DeepSpeed's ZeRO stages with and without offload.

All make the same steps from the same batches (tests/train/test_strategies.py). DeepSpeed is imported only where one of its stages is asked for.
"""

import contextlib
import difflib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.memory import machine
from rwkv.memory.zero import STRATEGIES, ZEROS, Zero
from rwkv.train.runtime.lightning import DeepSpeedStrategy

# The keys of a DeepSpeed configuration that --ds_config may set; DeepSpeed itself takes any word at its top level for a key and passes over it.
_OFFLOAD = {
    "device",
    "nvme_path",
    "pin_memory",
    "buffer_count",
    "buffer_size",
    "max_in_cpu",
    "fast_init",
    "pipeline_read",
    "pipeline_write",
}
_KEYS = {
    "": {
        "activation_checkpointing", "aio", "communication_data_type", "disable_allgather", "dump_state",
        "flops_profiler", "gradient_predivide_factor", "memory_breakdown", "prescale_gradients", "steps_per_print", "wall_clock_breakdown",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
    },
    "zero_optimization": {
        "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "ignore_unused_parameters", "offload_optimizer", "offload_param",
        "overlap_comm", "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "stage3_max_live_parameters",
        "stage3_max_reuse_distance", "stage3_model_persistence_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
        "sub_group_size",
    },
    "zero_optimization.offload_optimizer": _OFFLOAD - {"buffer_size", "max_in_cpu"},
    "zero_optimization.offload_param": _OFFLOAD - {"fast_init", "pipeline_read", "pipeline_write"},
}  # fmt: skip
_FLAGS = {
    "train_batch_size": "--micro_bsz, --devices, --num_nodes and --accumulate_grad_batches",
    "train_micro_batch_size_per_gpu": "--micro_bsz",
    "gradient_accumulation_steps": "--accumulate_grad_batches",
    "gradient_clipping": "--grad_clip",
    "optimizer": "--lr_init, --beta1, --beta2, --adam_eps and --weight_decay",
    "scheduler": "--lr_init, --lr_final and --warmup_steps",
    "fp16": "--precision fp16",
    "bf16": "--precision bf16",
    "amp": "--precision",
    "zero_optimization.stage": "--strategy deepspeed_stage_N",
}


def zero(c: TrainConfig) -> Zero | None:
    """What DeepSpeed does in this run; None without it."""
    return ZEROS.get(c.strategy)


def check(c: TrainConfig) -> None:
    """Raises UserError for a strategy that there is not, or not here, and for a DeepSpeed configuration with a key that nobody would read."""
    if c.strategy not in STRATEGIES:
        nearest = difflib.get_close_matches(c.strategy, STRATEGIES, 1, 0.5)
        raise UserError(
            f"--strategy {c.strategy} is not one of auto, ddp, {', '.join(ZEROS)}"
            + (f"; did you mean {nearest[0]}?" if nearest else "")
        )
    if c.ds_bucket_mb < 1:
        raise UserError(f"--ds_bucket_mb must be at least 1; it is {c.ds_bucket_mb}")
    if not zero(c):
        if c.ds_config:
            raise UserError(
                f"--ds_config {c.ds_config} is for DeepSpeed, and --strategy is {c.strategy}; give --strategy deepspeed_stage_2, say"
            )
        return
    if ZEROS[c.strategy].stage == 3 and c.tbptt_len:
        raise UserError(
            f"--tbptt_len is not supported with ZeRO-3 (--strategy {c.strategy}: parameters are sharded); use --strategy deepspeed_stage_2"
        )
    if c.on_nan == "skip":
        raise UserError(
            f"--on_nan skip: DeepSpeed (--strategy {c.strategy}) cannot skip steps except on fp16 overflow; omit the flag, or use --strategy ddp"
        )
    if reason := compat.deepspeed_refusal(on_gpu=machine.use_gpu(c.accelerator)):
        raise UserError(f"--strategy {c.strategy}: {reason}")
    deepspeed_config(c)


def shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter. Under ZeRO-3 its own shape is [0]."""
    return getattr(parameter, "ds_shape", parameter.shape)


def make(c: TrainConfig, gpu: bool) -> "ZeroStrategy | str | None":
    """What Lightning's trainer takes as strategy; None for one device alone."""
    if zero(c):
        return ZeroStrategy(deepspeed_config(c), gpu)
    return None if alone(c) else "ddp_find_unused_parameters_false"


def alone(c: TrainConfig) -> bool:
    """Whether one process trains without any connection to others."""
    return c.strategy == "auto" and c.world_size == 1


def mean(x: Tensor) -> Tensor:
    """Of all ranks' x. Lightning's reduce begins with a barrier, for which NCCL has the host wait for the GPU; this does not wait."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def deepspeed_was_used() -> bool:
    """Whether a run of this process used DeepSpeed, which keeps its process groups for the life of the process and
    fails once they are destroyed."""
    comm = sys.modules.get("deepspeed.comm.comm")
    return getattr(comm, "cdb", None) is not None


def leave_process_group() -> None:
    """Disconnect from the other processes of the run; called by all of them before they exit. A process that exits while connected may be aborted by
    its communication threads ("terminate called without an active exception"), which a launcher reports as a failure."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def deepspeed_config(c: TrainConfig) -> dict[str, Any]:
    """The DeepSpeed configuration that the flags make, with --ds_config on top. Batch, accumulation, clipping and precision are Lightning's to add.

    Raises:
        UserError: --ds_config is no JSON object, has a key that DeepSpeed does not know, or one that a flag stands for.
    """
    kind, bucket = ZEROS[c.strategy], c.ds_bucket_mb * 1000 * 1000  # upstream's: numbers, not bytes
    config: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's Adam does where DeepSpeed's is not compiled
        "train_micro_batch_size_per_gpu": c.micro_bsz,
        **compat.deepspeed_options(),
        "zero_optimization": {
            "stage": kind.stage,
            "allgather_bucket_size": bucket,
            "reduce_bucket_size": bucket,
            "allgather_partitions": True,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_scatter": True,
            **({"offload_optimizer": {"device": "cpu"}} if kind.offload_optimizer else {}),
            **({"offload_param": {"device": "cpu"}} if kind.offload_weights else {}),
        },
    }
    if c.ds_config:
        extra = _read(c.ds_config)
        _check_keys(extra, "", c.ds_config)
        _lay_on(config, extra)
    return config


def _read(path: str) -> dict[str, Any]:
    try:
        extra = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--ds_config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--ds_config {path}: not valid JSON ({error})") from error
    if not isinstance(extra, dict):
        raise UserError(f"--ds_config {path}: holds {type(extra).__name__}, not an object of DeepSpeed's keys")
    return extra


def _check_keys(given: Mapping[str, Any], place: str, path: str) -> None:
    for key, value in given.items():
        name = f"{place}.{key}".lstrip(".")
        if name in _FLAGS:
            raise UserError(f"--ds_config {path}: {name} is set by {_FLAGS[name]}; leave it out there")
        if key not in _KEYS[place]:
            nearest = difflib.get_close_matches(key, _KEYS[place], 1, 0.0)[0]
            raise UserError(
                f"--ds_config {path}: DeepSpeed has no key {name} that could be set here; the nearest is {nearest}"
            )
        if name in _KEYS:
            if not isinstance(value, dict):
                raise UserError(f"--ds_config {path}: {name} is an object of keys; it is {json.dumps(value)}")
            _check_keys(value, name, path)


def _lay_on(config: dict[str, Any], extra: Mapping[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _lay_on(config[key], value)
        else:
            config[key] = value


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, made to train as the others do; also on CPUs, which Lightning refuses and newer DeepSpeeds can."""

    def __init__(self, config: dict[str, Any], gpu: bool):
        compat.import_deepspeed(gpu)
        super().__init__(config=config)
        self._gpu = gpu

    @property
    def root_device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        return super().root_device if self._gpu else torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        """As Lightning's, which refuses a CPU here."""
        if self._gpu:
            super().setup_environment()
        else:
            super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """As Lightning's, which asks CUDA for the devices' numbers here."""
        if self._gpu:
            super().setup_distributed()
        else:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Nothing: the model exists already, and init_deepspeed partitions it. Lightning's would wrap the constructors of all modules, which 0.7.0 does not
        undo where one is inherited."""
        yield

    def init_deepspeed(self) -> None:
        """Weights to where DeepSpeed wants them, the engine, and an optimizer that has made no step.

        Raises:
            UserError: DeepSpeed refuses what --ds_config says.
        """
        try:
            self._init_deepspeed()
        except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
            if not (path := self._module.config.ds_config):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--ds_config {path}: DeepSpeed refuses it ({reason})") from error

    def _init_deepspeed(self) -> None:
        import deepspeed

        self._fit_buckets()
        if self.zero_stage_3:
            self._module.model.reentrant = compat.zero3_recomputes_reentrantly()
            # Partitioned one by one: the whole model is never on a GPU. The engine by itself would first move it there (0.7.0).
            for parameter in self._module.parameters():  # the engine does that to a model that is not partitioned yet
                parameter.data = parameter.data.to(self._dtype())
            deepspeed.zero.Init(module=self.lightning_module, config_dict_or_path=self.config, dtype=self._dtype())
        if self._gpu:
            # As the engine will: torch's fused Adam needs its parameters on the GPU when it is made. Under stage 3 they are empty by now.
            self._module.to(self.root_device)
        super().init_deepspeed()
        engine: Any = self.optimizers[0]  # DeepSpeed's, around torch's
        compat.forget_steps(engine.optimizer)

    def _fit_buckets(self) -> None:
        """Buckets no larger than all gradients together: DeepSpeed allocates them whole (memory._buckets reckons so)."""
        zero: Any = self.config["zero_optimization"]  # type: ignore[index]  # a dict since __init__
        trained = sum(shape(parameter).numel() for parameter in self._module.parameters() if parameter.requires_grad)
        for key in ("allgather_bucket_size", "reduce_bucket_size"):
            zero[key] = min(zero[key], max(1, trained))

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the accumulated batches already; DeepSpeed would once more, and the gradient be as much too small."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's; the module learns the norm that DeepSpeed clipped by, inf where a gradient was NaN or infinite and the step was skipped.

        Raises:
            UserError: gradients overflow fp16 at the smallest loss scale.
        """
        engine = self.deepspeed_engine
        skipped = engine.skipped_steps
        try:
            done = super().optimizer_step(*args, **kwargs)
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise UserError(
                "--precision fp16: the gradients overflow at the smallest loss scale. Give --precision bf16 or fp32, or a lower --lr_init"
            ) from error
        norm = engine.get_global_grad_norm()
        if engine.skipped_steps > skipped:  # 0.7.0 leaves the norm of the step before
            norm = math.inf
        # A number goes to the GPU with the kernel that fills a tensor; to copy one there would wait.
        self._module.grad_norm = (
            norm if norm is None or isinstance(norm, Tensor) else torch.full((), float(norm), device=self.root_device)
        )
        return done

    @property
    def _module(self) -> Any:  # by the time that it is asked for it is there
        return self.lightning_module

    def _dtype(self) -> torch.dtype:
        precision = str(self.precision_plugin.precision)
        return (
            torch.bfloat16
            if precision.startswith("bf16")
            else torch.float16
            if precision.startswith("16")
            else torch.float32
        )
