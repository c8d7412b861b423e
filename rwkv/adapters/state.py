"""State tuning: train the state with which documents begin, while all weights stay frozen.

A block has one trained tensor, `blocks.i.att.time_state`, fp32, from which its WKV state begins in
every document (reset); token shifts begin with zeros, as without tuning. RWKV-5.2 to 7:
[H, N (value), N (key)], as in RWKV-PEFT's and RWKV-LM's files. RWKV-4: [3, A], see
rwkv.models.v4. In an adapter it is the part `state`, beside LoRA or alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.models import RWKV, State
from rwkv.models.rwkv import shapes

PART = "state"
_NAME = re.compile(r"blocks\.(\d+)\.att\.time_state")


def is_state(names: Iterable[str]) -> bool:
    """Whether these are the names of a tuned state alone."""
    found = list(names)
    return bool(found) and all(_NAME.fullmatch(name) for name in found)


def attach(model: RWKV) -> None:
    """Add an initial state to every time-mix of a model that has none, in place: the empty one,
    which does not change the model's outputs.
    """
    if model.sizes.time_state:
        return
    model.sizes = replace(model.sizes, time_state=True)
    for name, shape in shapes_of(model.sizes).items():
        mix = model.get_submodule(name.rpartition(".")[0])
        zeros = torch.zeros(shape, device=model.emb.weight.device)
        mix.time_state = nn.Parameter(zeros)


def shapes_of(sizes: Any) -> dict[str, torch.Size]:
    """The shapes of a tuned state for a model of these Sizes, by name."""
    every = shapes(replace(sizes, time_state=True))
    return {name: shape for name, shape in every.items() if _NAME.fullmatch(name)}


def state_of(model: RWKV, tensors: Mapping[str, Tensor]) -> State:
    """The model's state before the first token of a document, for one batch row, with these tuned
    tensors. The model itself does not change.
    """
    tuned = {int(match[1]): tensor for name, tensor in tensors.items() if (match := _NAME.fullmatch(name))}
    return model.with_wkv(model.initial_state(1), tuned)
