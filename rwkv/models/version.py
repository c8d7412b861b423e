"""The interface of version modules (v4.py to v7.py), and detection of a checkpoint's version.

A version is one module. Code outside rwkv.models does not compare version numbers; a module for
files of other programs may have one table by version (tests/test_layout.py).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rwkv.errors import UserError
from rwkv.models import v4, v5, v6, v7
from rwkv.models.parts import Parts, layer_of

Shapes = Mapping[str, torch.Size]


class Sizes(Protocol):
    """The sizes of a model. Each version has a frozen dataclass with at least these fields, and
    defaults for all fields.
    """

    @property
    def n_layer(self) -> int:
        """Number of blocks."""

    @property
    def n_embd(self) -> int:
        """Width of the residual stream."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary."""

    @property
    def dim_ffn(self) -> int:
        """Width of the channel-mix."""

    @property
    def time_state(self) -> bool:
        """Whether every time-mix has a tuned initial state of WKV, `att.time_state`, with which
        documents begin.
        """

    def __hash__(self) -> int: ...


class Version(Protocol):
    """The interface of a version's module."""

    @property
    def NAME(self) -> str:
        """The version, e.g. "4"."""

    @property
    def WARMUP_START(self) -> float:
        """Initial warm-up factor of the learning rate in upstream's trainer."""

    @property
    def PUBLISHED(self) -> Mapping[str, Any]:
        """Sizes of the published models by name, e.g. "1.5b"."""

    @property
    def PARTS(self) -> Parts:
        """The possible parts of an adapter."""

    @property
    def Sizes(self) -> Any:
        """Dataclass of the sizes."""

    @property
    def Block(self) -> Any:
        """The block module: Block(sizes, layer, device), with forward(x, state, carry, reset,
        dropout) -> (x, state, carry). `state` is passed on over time, `carry` from block to block;
        both are tuples of tensors.
        """

    def initial_state(self, sizes: Any, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        """A block's empty state, with the device and dtype of `like` (some parts are always fp32):
        the last input of the time-mix, the WKV state, the last input of the channel-mix.
        """

    def wkv_state(self, time_state: Tensor) -> Tensor:
        """The WKV state of a block, without a batch dimension, from its tuned initial state
        `att.time_state`, whose layout is that of upstream's files.
        """

    def recognise(self, shapes: Shapes, n_layer: int) -> Any:
        """The sizes of a checkpoint. Raises ValueError naming missing tensors if it is not of this
        version.
        """

    def initialise(self, model: nn.Module, emb_scale: float, frozen: bool) -> None:
        """Initialise weights; see RWKV.initialise."""

    def lr_scale(self, name: str, stage_2: bool) -> float:
        """Learning-rate factor of a parameter; `stage_2`: with --my_pile_stage 2."""

    def decays(self, name: str, shape: torch.Size) -> bool:
        """Whether weight decay applies to a parameter."""

    def saved_bytes(self, sizes: Any, e: int) -> float:
        """Bytes of saved activations per token and block, with e bytes per element."""

    def forward_bytes(self, sizes: Any, e: int) -> float:
        """Peak bytes per token of temporary tensors of a block's forward pass, if none is saved."""

    def backward_bytes(self, sizes: Any, e: int) -> float:
        """Peak bytes per token of temporary tensors in the backward pass of a block."""

    def gpu_backward_bytes(self, sizes: Any, e: int, tokens: int, rows: int) -> float:
        """Peak bytes of temporary tensors in the backward pass of a block on a GPU, with the
        workspace of the WKV kernels, for so many tokens in all of `rows` sequences.
        """


VERSIONS: dict[str, Version] = {v4.NAME: v4, v5.NAME: v5, v6.NAME: v6, v7.NAME: v7}
ALIASES = {"5": v5.NAME}
DEFAULT: Version = v7  # version of new models
LARGEST, LARGEST_WIDTH = {"n_layer": 1000, "vocab_size": 1 << 24}, 1 << 18
"""Limits for the sizes of new models, far above those of published ones: with larger ones even
the memory could not be predicted.
"""
_ROUNDED = {"3b": "2.9b", "7b": "7.2b", "14b": "13.3b"}  # other names of published models


def version_of(sizes: Sizes) -> Version:
    """The version that a Sizes object belongs to."""
    return next(version for version in VERSIONS.values() if isinstance(sizes, version.Sizes))


def named(name: str) -> Version:
    """The version of this name, e.g. "7"; DEFAULT for an empty name. Raises UserError."""
    name = ALIASES.get(name, name)
    if name and name not in VERSIONS:
        raise UserError(f"--version {name}: not one of {', '.join(VERSIONS)}")
    return VERSIONS[name] if name else DEFAULT


def published(name: str, version: Version = DEFAULT) -> Sizes:
    """Sizes of a published model, e.g. "1.5b"; "7b" also names the 7.2b one. Raises UserError."""
    known = version.PUBLISHED
    found = known.get(name.lower()) or known.get(_ROUNDED.get(name.lower(), ""))
    if not found:
        raise UserError(
            f"--model {name} is not one of {', '.join(known)} (RWKV-{version.NAME}); pass --load_model, or --n_layer and --n_embd"
        )
    return found


def sizes_given(flags: object, version: Version) -> dict[str, int]:
    """The non-zero sizes among the attributes of `flags`. Raises UserError for one that models of
    this version lack.
    """
    every = dict.fromkeys(field.name for known in VERSIONS.values() for field in fields(known.Sizes))
    given = {name: value for name in every if (value := getattr(flags, name, 0))}
    possible = {field.name for field in fields(version.Sizes)}
    if wrong := [name for name in given if name not in possible]:
        raise UserError(f"--{wrong[0]} {given[wrong[0]]}: RWKV-{version.NAME} models have no {wrong[0]}; omit it")
    return given


def new_sizes(flags: object, version: Version) -> Sizes:
    """Sizes of a new model, from attributes of `flags`. Raises UserError if they are invalid."""
    given = sizes_given(flags, version)
    for name, value in given.items():
        if value > (limit := LARGEST.get(name, LARGEST_WIDTH)):
            raise UserError(f"--{name} must be at most {limit:,}; it is {value:,}")
    try:
        return version.Sizes(**given)
    except ValueError as error:
        raise UserError(f"{' '.join(f'--{name} {value}' for name, value in given.items())}: {error}") from None


def fully_trained(name: str) -> bool:
    """Whether a parameter of this name is fully trained by a part of an adapter, in any version."""
    return any(version.PARTS.fully_trained(name, version.PARTS.full) for version in VERSIONS.values())


def fitting(names: Iterable[str]) -> Version:
    """The first version whose adapters can have tensors of these names, else DEFAULT."""
    for version in VERSIONS.values():
        parts = version.PARTS
        if all(
            parts.fully_trained(name, parts.full) or layer_of(name.rpartition(".lora_")[0]) in parts.layers
            for name in names
        ):
            return version
    return DEFAULT


def layer_numbers(names: Iterable[str]) -> set[int]:
    """The block numbers in these tensor names."""
    return {int(match[1]) for name in names if (match := re.match(r"blocks\.(\d{1,9})\.", name))}


def detect(shapes: Shapes) -> tuple[Version, Sizes]:
    """Version and sizes of a checkpoint, from its tensors' shapes.

    Raises:
        ValueError: not a checkpoint of a supported version, or a block is missing.
    """
    layers, reasons = layer_numbers(shapes), []
    for version in VERSIONS.values():
        try:
            # not the largest number, which may be any: a block may be missing, see below
            sizes = version.recognise(shapes, len(layers))
        except ValueError as error:
            reasons.append(f"not an RWKV-{version.NAME} checkpoint ({error})")
            continue
        if max(layers) >= len(layers):
            absent = next(layer for layer in range(len(layers)) if layer not in layers)
            raise ValueError(f"block {absent} is missing (the last one is {max(layers)})")
        return version, sizes
    raise ValueError("; ".join(reasons))
