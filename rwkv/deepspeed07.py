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
