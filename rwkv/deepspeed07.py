"""Patches for bugs of DeepSpeed 0.7.0, applied at import by compat.import_deepspeed. Newer versions
do not need them.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch


@functools.cache
def apply() -> None:
    """Apply all patches. Called once per process, before the first engine is created."""
    _flatten_without_compiling()
    _reduce_in_the_gradients_dtype()
    _disable_throughput_timer()
    _read_all_gradients_at_once()


def _flatten_without_compiling() -> None:
    """Engine and ZeRO optimizers compile a C++ extension (needs g++, ninja and Python.h) for two
    functions that torch has.
    """
    from deepspeed.ops.op_builder import UtilsBuilder

    loaded = SimpleNamespace(
        flatten=torch._utils._flatten_dense_tensors, unflatten=torch._utils._unflatten_dense_tensors
    )
    UtilsBuilder.load = lambda *_, **__: loaded


def _reduce_in_the_gradients_dtype() -> None:
    """Stage 1, and stage 2 without reduce_scatter, reduce all gradients in fp16, in which small
    ones underflow and large ones overflow.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as zero

    reduce_bucket, reduce_tensor = zero.allreduce_bucket, zero.gradient_reduction_w_predivide

    def allreduce_bucket(
        self: Any, bucket: list[torch.Tensor], communication_data_type: Any = None, **options: Any
    ) -> torch.Tensor:
        return reduce_bucket(self, bucket, communication_data_type or _reduction_dtype(self, bucket[0]), **options)

    def gradient_reduction_w_predivide(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        configured, self.communication_data_type = self.communication_data_type, _reduction_dtype(self, tensor)
        try:
            return reduce_tensor(self, tensor)
        finally:
            self.communication_data_type = configured

    zero.allreduce_bucket, zero.gradient_reduction_w_predivide = allreduce_bucket, gradient_reduction_w_predivide


def _reduction_dtype(optimizer: Any, gradient: torch.Tensor) -> torch.dtype:
    """The dtype in which to reduce a gradient: communication_data_type, or its own if that is fp16,
    the default.
    """
    configured = getattr(optimizer, "communication_data_type", torch.float16)
    return gradient.dtype if configured == torch.float16 else configured


def _disable_throughput_timer() -> None:
    """The throughput timer would synchronise with the GPU twice per micro-batch."""
    from deepspeed.utils.timer import ThroughputTimer

    ThroughputTimer.start = ThroughputTimer.stop = lambda *_, **__: None


def _read_all_gradients_at_once() -> None:
    """The host reads an overflow flag and a norm of every gradient in a step, and waits for the GPU
    each time. Read them together: one flag per step, the norms of one group of parameters at a
    time. The original functions then get values on the host.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as zero

    has_overflow, norm_direct = zero.has_overflow, zero.get_grad_norm_direct

    def overflow_of_partition(self: Any) -> bool:
        gradients = (g for i in range(len(self.bit16_groups)) for g in self.averaged_gradients[i])
        invalid = [_is_invalid(g) for g in gradients if g is not None]
        return bool(invalid) and bool(torch.stack(invalid).any())

    def track_overflow(self: Any, parameter: torch.nn.Parameter) -> None:  # with offload, during the backward pass
        if parameter.grad is not None:
            invalid, before = _is_invalid(parameter.grad), self.local_overflow
            self.local_overflow = invalid if before is False else invalid | before

    def overflow(self: Any, *arguments: Any, **options: Any) -> bool:
        if self.cpu_offload:
            self.local_overflow = bool(self.local_overflow)
        return has_overflow(self, *arguments, **options)

    def norm_of_partition(self: Any, gradients: Any, parameters: Any, **options: Any) -> float:
        # the norm of a norm is the norm
        return norm_direct(self, _on_host([g.detach().double().norm(2) for g in gradients]), parameters, **options)

    zero.has_overflow_partitioned_grads_serial, zero.has_overflow = overflow_of_partition, overflow
    zero.update_overflow_tracker_for_param_grad, zero.get_grad_norm_direct = track_overflow, norm_of_partition
    for kind in (zero, zero3):
        kind.complete_grad_norm_calculation_for_cpu_offload = _with_norms_on_host(
            kind.complete_grad_norm_calculation_for_cpu_offload
        )


def _is_invalid(gradient: torch.Tensor) -> torch.Tensor:
    """Whether the sum of a gradient is NaN or Inf, as DeepSpeed's _has_inf_or_nan, but on its
    device.
    """
    return ~gradient.detach().float().sum().isfinite()


def _on_host(scalars: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of scalars in fp64 on the host, by one transfer."""
    values = torch.stack(scalars).tolist() if scalars else []
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def _with_norms_on_host(complete: Any) -> Any:
    """A method of an optimizer that reads `norm_for_param_grads`, preceded by one copy to the
    host.
    """

    def run(self: Any, parameters: Any) -> float:
        norms = self.norm_for_param_grads
        present = [number for number in map(self.get_param_id, parameters) if number in norms]
        norms.update(zip(present, _on_host([norms[number] for number in present]), strict=True))
        return complete(self, parameters)

    return run
