"""Corrections to DeepSpeed 0.7.0, applied at run time by compat.import_deepspeed; its files stay as they are. Newer versions need none of them."""

import functools
from types import SimpleNamespace
from typing import Any

import torch


@functools.cache
def correct() -> None:
    """Apply all corrections, once in a process. DeepSpeed must be importable; no engine may have been made yet."""
    _flatten_without_compiling()
    _reduce_in_the_gradients_dtype()
    _do_not_time_throughput()


def _flatten_without_compiling() -> None:
    """Its engine and its ZeRO optimizers compile a C++ extension when they are made, which takes g++, ninja and Python.h, that is two functions of torch's."""
    from deepspeed.ops.op_builder import UtilsBuilder

    loaded = SimpleNamespace(
        flatten=torch._utils._flatten_dense_tensors, unflatten=torch._utils._unflatten_dense_tensors
    )
    UtilsBuilder.load = lambda *_, **__: loaded


def _reduce_in_the_gradients_dtype() -> None:
    """Stage 1, and stage 2 without reduce_scatter, reduce gradients in fp16 whatever they are: small ones become 0 and large ones inf."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as zero

    reduce_bucket, reduce_tensor = zero.allreduce_bucket, zero.gradient_reduction_w_predivide

    def allreduce_bucket(
        self: Any, bucket: list[torch.Tensor], communication_data_type: Any = None, **options: Any
    ) -> torch.Tensor:
        return reduce_bucket(self, bucket, communication_data_type or _communicated(self, bucket[0]), **options)

    def gradient_reduction_w_predivide(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        configured, self.communication_data_type = self.communication_data_type, _communicated(self, tensor)
        try:
            return reduce_tensor(self, tensor)
        finally:
            self.communication_data_type = configured

    zero.allreduce_bucket, zero.gradient_reduction_w_predivide = allreduce_bucket, gradient_reduction_w_predivide


def _communicated(optimizer: Any, gradient: torch.Tensor) -> torch.dtype:
    """The dtype to reduce a gradient in: its own, or what communication_data_type asks for. fp16 is the default there, so it does not count as asked for."""
    configured = getattr(optimizer, "communication_data_type", torch.float16)
    return gradient.dtype if configured == torch.float16 else configured


def _do_not_time_throughput() -> None:
    """Its throughput timer waits for the GPU twice in each micro-batch."""
    from deepspeed.utils.timer import ThroughputTimer

    ThroughputTimer.start = ThroughputTimer.stop = lambda *_, **__: None
