"""Move inputs to the GPU; what it supports."""

import torch


def on_gpu(*arguments):
    """The arguments on the GPU: tensors, lists of tensors, and None."""
    return [None if x is None else [t.cuda() for t in x] if isinstance(x, list) else x.cuda() for x in arguments]


def has_tensor_cores():
    """Whether it has tensor cores for TF32, which the kernels by chunks need."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
