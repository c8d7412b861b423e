"""The versions of RWKV: what each file v*.py offers, and which version a checkpoint or a model is.

A version is one module. Outside rwkv.models and rwkv.wkv nothing asks for a version by number.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rwkv.models import v4, v7
from rwkv.models.parts import Parts

Shapes = Mapping[str, torch.Size]


class Sizes(Protocol):
    """The sizes of a model; each version has its own frozen dataclass with these fields and more, and defaults for all."""

    @property
    def n_layer(self) -> int:
        """Number of blocks."""

    @property
    def n_embd(self) -> int:
        """Width of the residual stream."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    @property
    def dim_ffn(self) -> int:
        """Width inside the channel mix."""

    def __hash__(self) -> int: ...


class Version(Protocol):
    """What a version's module offers."""

    @property
    def NAME(self) -> str:
        """Such as "4"."""

    @property
    def PUBLISHED(self) -> Mapping[str, Any]:
        """The sizes of the published models by name, such as "1.5b"."""

    @property
    def PARTS(self) -> Parts:
        """What an adapter can train."""

    @property
    def Sizes(self) -> Any:
        """The dataclass of its sizes."""

    @property
    def Block(self) -> Any:
        """Block(sizes, layer, device); forward(x, state, carry, reset, dropout) -> x, state, carry: `state` is
        carried over time, `carry` from block to block, both tuples of tensors."""

    def initial_state(self, sizes: Any, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        """A block's state before the first token, on the device and, but for fp32 parts, in the dtype of `like`."""

    def recognise(self, shapes: Shapes, n_layer: int) -> Any:
        """The sizes of a checkpoint. Raises ValueError that names what is missing, if it is not of this version."""

    def initialise(self, model: nn.Module, emb_scale: float, frozen: bool) -> None:
        """Initial weights; see RWKV.initialise."""

    def lr_scale(self, name: str, stage_2: bool) -> float:
        """The factor of a parameter's learning rate; `stage_2`: in --my_pile_stage 2."""

    def decays(self, name: str, shape: torch.Size) -> bool:
        """Whether weight decay applies to a parameter."""

    def saved_bytes(self, sizes: Any, e: int) -> float:
        """Activation bytes per token and block saved for the backward pass, with e bytes per element."""

    def transformers_config(self, sizes: Any) -> dict[str, Any]:
        """config.json of the model in transformers. Raises ValueError if transformers has no such model."""


VERSIONS: dict[str, Version] = {v4.NAME: v4, v7.NAME: v7}
DEFAULT: Version = v4  # of a new model


def version_of(sizes: Sizes) -> Version:
    """The version that these sizes belong to."""
    return next(version for version in VERSIONS.values() if isinstance(sizes, version.Sizes))


def published(name: str) -> Sizes:
    """The sizes of a published model, e.g. "1.5b". Raises KeyError."""
    return DEFAULT.PUBLISHED[name.lower()]


def sizes_given(flags: object, version: Version = DEFAULT) -> dict[str, int]:
    """The sizes that flags (fields of any object) set; 0 leaves the default."""
    values = {field.name: getattr(flags, field.name, 0) for field in fields(version.Sizes)}
    return {name: value for name, value in values.items() if value}


def layer_numbers(names: Iterable[str]) -> set[int]:
    """The numbers of the blocks that these tensors belong to."""
    return {int(match[1]) for name in names if (match := re.match(r"blocks\.(\d{1,9})\.", name))}


def detect(shapes: Shapes) -> tuple[Version, Sizes]:
    """The version and the sizes of a checkpoint with tensors of these shapes.

    Raises:
        ValueError: not a checkpoint of a version that is known; or one with a block missing.
    """
    layers, reasons = layer_numbers(shapes), []
    for version in VERSIONS.values():
        try:
            sizes = version.recognise(shapes, max(layers, default=-1) + 1)
        except ValueError as error:
            reasons.append(f"not an RWKV-{version.NAME} checkpoint ({error})")
            continue
        if max(layers) >= len(layers):
            absent = next(layer for layer in range(len(layers)) if layer not in layers)
            raise ValueError(f"its keys do not fit. It has block {max(layers)}, and no block {absent}")
        return version, sizes
    raise ValueError("; ".join(reasons))
