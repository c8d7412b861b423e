"""Parallel strategies: a single device, DDP, or DeepSpeed's ZeRO stages with and without offload.

All compute the same updates from the same batches (tests/train/test_strategies.py). DeepSpeed is
imported only if used.
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

# Keys that --ds_config may set. DeepSpeed silently ignores unknown top-level keys, so misspelt ones
# are rejected here.
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
_SET_BY_FLAGS = {
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
    """The ZeRO configuration of this run; None without DeepSpeed."""
    return ZEROS.get(c.strategy)


def check(c: TrainConfig) -> None:
    """Raise UserError if the strategy is unknown, unavailable or incompatible with other flags, or
    the DeepSpeed configuration is invalid.
    """
    if c.strategy not in STRATEGIES:
        nearest = difflib.get_close_matches(c.strategy, STRATEGIES, 1, 0.5)
        raise UserError(
            f"--strategy {c.strategy} is not one of auto, ddp, {', '.join(ZEROS)}"
            + (f"; did you mean {nearest[0]}?" if nearest else "")
        )
    if not zero(c):
        if c.ds_config:
            raise UserError(
                f"--ds_config {c.ds_config} needs DeepSpeed, but --strategy is {c.strategy}; use e.g. --strategy deepspeed_stage_2"
            )
        return
    if c.adapter and c.adapter.quantised:
        raise UserError(
            f"--lora_base {c.adapter.lora_base} is not supported with DeepSpeed (--strategy {c.strategy}), which would not shard or offload"
            " quantised matrices; use --strategy auto or ddp: with a quantised base only an adapter has gradients and optimizer states"
        )
    if ZEROS[c.strategy].stage == 3 and c.tbptt_len:
        raise UserError(
            f"--tbptt_len is not supported with ZeRO-3 (--strategy {c.strategy}: parameters are sharded); use --strategy deepspeed_stage_2"
        )
    if c.on_nan == "skip":
        raise UserError(
            f"--on_nan skip: DeepSpeed (--strategy {c.strategy}) cannot skip steps except on fp16 overflow; omit the flag, or use --strategy ddp"
        )
    if reason := compat.why_deepspeed_unavailable(on_gpu=machine.use_gpu(c.accelerator)):
        raise UserError(f"--strategy {c.strategy}: {reason}")
    deepspeed_config(c)


def shape(parameter: nn.Parameter) -> torch.Size:
    """The full shape of a parameter, also if it is sharded by ZeRO-3, where its local shape is
    [0].
    """
    return getattr(parameter, "ds_shape", parameter.shape)


def make(c: TrainConfig, gpu: bool) -> "ZeroStrategy | str | None":
    """The strategy for Lightning's trainer; None for a single device."""
    if zero(c):
        return ZeroStrategy(deepspeed_config(c), gpu)
    return None if is_single_process(c) else "ddp_find_unused_parameters_false"


def is_single_process(c: TrainConfig) -> bool:
    """Whether the run has a single process and no process group."""
    return c.strategy == "auto" and c.world_size == 1


def mean(x: Tensor) -> Tensor:
    """The mean of x over all ranks. Unlike Lightning's reduce it has no barrier, so the host does
    not wait for the GPU.
    """
    return total(x) / dist.get_world_size() if dist.is_available() and dist.is_initialized() else x


def total(x: Tensor) -> Tensor:
    """The sum of x over all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    found = x.clone()
    dist.all_reduce(found)
    return found


def deepspeed_was_used() -> bool:
    """Whether this process has used DeepSpeed, which needs its process groups until the process
    exits.
    """
    comm = sys.modules.get("deepspeed.comm.comm")
    return getattr(comm, "cdb", None) is not None


def leave_process_group() -> None:
    """Destroy the process group; a collective operation, to be called before exit. Otherwise a
    process may be aborted by its communication threads ("terminate called without an active
    exception"), which launchers report as a failure.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def deepspeed_config(c: TrainConfig) -> dict[str, Any]:
    """The DeepSpeed configuration from the flags, with --ds_config merged into it. Lightning adds
    batch size, accumulation, clipping and precision.

    Raises:
        UserError: --ds_config is not a JSON object, or has a key that is unknown or set by a flag.
    """
    kind, bucket = ZEROS[c.strategy], c.ds_bucket_mb * 1000 * 1000  # in elements, as upstream
    config: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # allow torch's Adam if DeepSpeed's is not compiled
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
        _merge(config, extra)
    return config


def _read(path: str) -> dict[str, Any]:
    try:
        extra = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--ds_config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--ds_config {path}: not valid JSON ({error}); correct it there") from error
    if not isinstance(extra, dict):
        raise UserError(f"--ds_config {path}: contains {type(extra).__name__}, not a JSON object with DeepSpeed's keys")
    return extra


def _check_keys(given: Mapping[str, Any], section: str, path: str) -> None:
    for key, value in given.items():
        name = f"{section}.{key}".lstrip(".")
        if name in _SET_BY_FLAGS:
            raise UserError(f"--ds_config {path}: {name} is set by {_SET_BY_FLAGS[name]}; remove it from the file")
        if key not in _KEYS[section]:
            nearest = difflib.get_close_matches(key, _KEYS[section], 1, 0.0)[0]
            raise UserError(f"--ds_config {path}: unknown or unsupported key {name}; did you mean {nearest}?")
        if name in _KEYS:
            if not isinstance(value, dict):
                raise UserError(f"--ds_config {path}: {name} must be an object; it is {json.dumps(value)}")
            _check_keys(value, name, path)


def _merge(config: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Merge `extra` into `config`, recursively and in place."""
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = value


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with the same results as the other strategies. Also runs on
    CPUs, which Lightning does not allow but newer DeepSpeed versions support.
    """

    def __init__(self, config: dict[str, Any], gpu: bool):
        compat.import_deepspeed(gpu)
        super().__init__(config=config)
        self._gpu = gpu

    @property
    def root_device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        return super().root_device if self._gpu else torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        """As in Lightning, without its check for a GPU."""
        if self._gpu:
            super().setup_environment()
        else:
            super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """As in Lightning, without its use of CUDA device indices."""
        if self._gpu:
            super().setup_distributed()
        else:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Do nothing: the model exists and init_deepspeed shards it. Lightning would patch the
        constructors of all modules, and DeepSpeed 0.7.0 does not undo this for inherited ones.
        """
        yield

    def init_deepspeed(self) -> None:
        """Place the parameters, create the engine, and reset the optimizer's step count.

        Raises:
            UserError: DeepSpeed rejects --ds_config.
        """
        try:
            self._init_deepspeed()
        except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
            if not (path := self._module.config.ds_config):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"--ds_config {path}: rejected by DeepSpeed ({reason}); correct or remove that key"
            ) from error

    def _init_deepspeed(self) -> None:
        import deepspeed

        self._limit_buckets()
        if self.zero_stage_3:
            self._module.model.reentrant = compat.zero3_recomputes_reentrantly()
            # Shard parameters one at a time, so that the whole model is never on a GPU; the engine
            # of 0.7.0 would move it there first. The engine converts dtypes of unsharded models
            # only.
            for parameter in self._module.parameters():
                parameter.data = parameter.data.to(self._dtype())
                if not compat.zero3_broadcasts_weights() and self._is_random(parameter):
                    self._broadcast(parameter)
            deepspeed.zero.Init(module=self.lightning_module, config_dict_or_path=self.config, dtype=self._dtype())
        if self._gpu:
            # torch's fused Adam needs parameters on the GPU at construction (in stage 3 they are
            # empty by now)
            self._module.to(self.root_device)
        super().init_deepspeed()
        engine: Any = self.optimizers[0]  # DeepSpeed's wrapper of torch's optimizer
        compat.reset_step_counts(engine.optimizer)

    def _is_random(self, parameter: nn.Parameter) -> bool:
        """Whether the run initialised a parameter, instead of reading it from a file."""
        c = self._module.config
        return not c.load_model or bool(c.load_partial) or (c.adapter is not None and parameter.requires_grad)

    def _broadcast(self, parameter: nn.Parameter) -> None:
        """Use rank 0's values on all ranks. The parameter stays on the CPU."""
        value = parameter.data.to(self.root_device)
        dist.broadcast(value, 0)
        parameter.data = value.cpu()

    def _limit_buckets(self) -> None:
        """Limit bucket sizes to the number of trained elements, as DeepSpeed allocates buckets in
        full (see rwkv.memory.estimate).
        """
        zero: Any = self.config["zero_optimization"]  # type: ignore[index]  # a dict since __init__
        trained = sum(shape(parameter).numel() for parameter in self._module.parameters() if parameter.requires_grad)
        for key in ("allgather_bucket_size", "reduce_bucket_size"):
            zero[key] = min(zero[key], max(1, trained))

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As in Lightning, but DeepSpeed does not divide the loss by accumulate_grad_batches, as
        Lightning already has.
        """
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in Lightning; also sets the module's grad_norm: the norm used for clipping, or inf if
        DeepSpeed skipped the step because a gradient was NaN or Inf.

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
                "--precision fp16: the gradients overflow at the smallest loss scale. Use --precision bf16 or fp32, or a lower --lr_init"
            ) from error
        norm = engine.get_global_grad_norm()
        if engine.skipped_steps > skipped:  # 0.7.0 returns the norm of the previous step
            norm = math.inf
        # torch.full does not synchronise, unlike a copy from the host
        self._module.grad_norm = (
            norm if norm is None or isinstance(norm, Tensor) else torch.full((), float(norm), device=self.root_device)
        )
        return done

    @property
    def _module(self) -> Any:
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
