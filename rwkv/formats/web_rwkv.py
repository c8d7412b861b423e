"""The .st files of web-rwkv and Ai00: safetensors in fp16, with names of RWKV-5 for later versions
and transposed low-rank matrices.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv.formats.lazy import Lazy

DTYPE = torch.float16  # the only one that web-rwkv reads
WITH_STATE = ("5.2", "6", "7")  # versions whose tuned state a file can hold
_NAMES = (("time_faaaa", "time_first"), ("time_maa", "time_mix"))
_TRANSPOSED = re.compile(r"\.att\.([wavg][12]|time_(maa|mix|decay)_w[12]|time_state)$")


def convert(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """A model of any version in web-rwkv's layout, in its own dtypes."""
    found = {}
    for name, tensor in tensors.items():
        if _TRANSPOSED.search(name):
            tensor = tensor.then(lambda x: x.transpose(-2, -1))
        for ours, theirs in _NAMES:
            name = name.replace(ours, theirs)
        found[name] = tensor
    return found


def restore(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `convert`; transposed tensors are views."""
    late = any(name.endswith(".att.time_mix_x") for name in tensors)  # RWKV-6: time_maa; before: time_mix
    gated = any(name.endswith(".att.gate.weight") for name in tensors)  # RWKV-5.2 and 6: time_faaaa
    found = {}
    for name, tensor in tensors.items():
        if _TRANSPOSED.search(name):
            tensor = tensor.transpose(-2, -1)
        if late:
            name = name.replace("time_mix", "time_maa")
        if gated:
            name = name.replace("time_first", "time_faaaa")
        found[name] = tensor
    return found
