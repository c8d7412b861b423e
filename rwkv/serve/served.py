"""The models that are served by name: a base, and adapters and tuned states on it, which share the
base's weights in memory.
"""

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rwkv import adapter_files, checkpoint
from rwkv.adapters import lora
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.generate import matrices_dtype
from rwkv.memory import machine
from rwkv.models import RWKV, State

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")


@dataclass(frozen=True)
class Served:
    """A model that requests can name.

    Attributes:
        model: the weights. Models of the same object are decoded in one batch.
        state: the tuned state before the first token, for one batch row; None: the model's own.
        source: the files, for messages.
    """

    name: str
    model: RWKV
    state: State | None = None
    source: str = ""

    @property
    def begins_tuned(self) -> bool:
        """Whether a text begins with a tuned state, and so without EOD."""
        return self.state is not None or self.model.sizes.time_state


def device_and_dtype(path: str, accelerator: str, dtype: str) -> tuple[str, torch.dtype | None]:
    """The device of a model, and the dtype of its matrices and matmuls (None: fp32), by the flags
    --accelerator and --dtype.

    Raises:
        UserError: there is no such device, or it does not support the dtype.
    """
    machine.check_accelerator(accelerator)
    gpu = machine.use_gpu(accelerator)
    stored = checkpoint.read_tensors(path).get("head.weight", torch.empty(0)).dtype
    return "cuda" if gpu else "cpu", matrices_dtype(dtype, stored, gpu)


def world_tokenizer(model: RWKV, path: str) -> WorldTokenizer:
    """The tokenizer of a model. Raises UserError if its vocabulary is another."""
    if model.sizes.vocab_size != WorldTokenizer.vocab_size:
        raise UserError(
            f"{path}: {model.sizes.vocab_size} tokens, not the World vocabulary of 65536; use a World model, as only these can generate text"
        )
    return WorldTokenizer()


def with_adapter(base: RWKV, path: str, base_path: str, base_sha256: str, alpha: float | None = None) -> RWKV:
    """A model with an adapter, unmerged. It shares all of the base's parameters, except those that
    the adapter trained as a whole.

    Args:
        base_sha256: the hash of the base's file.
        alpha: of adapters without one in their manifest.

    Raises UserError like adapter_files.inspect_adapter and load_adapter.
    """
    alpha = None if "alpha" in adapter_files.read_manifest(path) else alpha
    tensors, known = adapter_files.inspect_adapter(path, base_path, alpha, base_sha256)
    # copies the modules, not the parameters
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    lora.inject(model, known["parts"], known["r"], known["alpha"], dora=known["use_dora"])
    shared = {name for name, _ in base.named_parameters()}
    for name in lora.adapter_names(model, known["parts"]):
        if name in shared:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Parameter(base.get_parameter(name).detach().clone()))
    adapter_files.load_adapter(model, path, tensors, known["parts"])
    return model.eval()


def named_files(flag: str, text: str) -> dict[str, str]:
    """The files of a flag `NAME=FILE,NAME=FILE`; without NAME= the file's stem is the name.

    Raises:
        UserError: a name occurs twice, or a file is missing.
    """
    found: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, path = entry.partition("=")
        if not equals or "/" in name:
            name, path = Path(entry).stem, entry
        if not path:
            raise UserError(f"--{flag} {entry}: no file after {name}=; pass {name}=FILE")
        if name in found:
            raise UserError(f"--{flag}: two of the files are named {name}; name them yourself: --{flag} NAME=FILE,...")
        found[name] = path
    return found


def check_names(base: str, adapters: Mapping[str, str], states: Mapping[str, str]) -> None:
    """Check the names of all models, before any is loaded.

    Raises:
        UserError: a name is invalid or occurs twice, or a state belongs to an unknown adapter.
    """
    names = [base, *adapters, *(name.partition(":")[0] for name in states)]
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} is not a valid model name: use letters, digits and . _ -, at most 64")
        if names.count(name) > 1:
            raise UserError(f"two models are named {name}; choose other names: NAME=FILE, and --name for the base")
    for name in states:
        adapter = name.partition(":")[2]
        if adapter and adapter not in adapters:
            raise UserError(
                f"--state {name}=...: there is no adapter named {adapter} (--lora: {', '.join(adapters) or 'none'})"
            )


def load(
    path: str,
    name: str = "base",
    adapters: Mapping[str, str] | None = None,
    states: Mapping[str, str] | None = None,
    *,
    alpha: float | None = None,
    device: str = "cpu",
    matrices: torch.dtype | None = None,
) -> dict[str, Served]:
    """Load a base model, adapters and tuned states; returns the models by name, the base first.

    Args:
        adapters: files by name.
        states: files by name; `NAME:ADAPTER` is a state for base + adapter.
        alpha: as in with_adapter.
        matrices: dtype of matrices, instead of fp32.

    Raises UserError like checkpoint.load_model, check_names, with_adapter,
    and adapter_files.check_one_state and load_state.
    """
    adapters, states = adapters or {}, states or {}
    check_names(name, adapters, states)
    for entry, file in states.items():
        if adapter := entry.partition(":")[2]:
            adapter_files.check_one_state(adapters[adapter], file)
    base = checkpoint.load_model(path, device, matrices=matrices).eval()
    base.requires_grad_(False)
    served = {name: Served(name, base, None, path)}
    digest = sha256(path) if adapters and os.path.isfile(path) else ""  # with_adapter rejects folders
    for adapter, file in adapters.items():
        model = with_adapter(base, file, path, digest, alpha).to(device).requires_grad_(False)
        served[adapter] = Served(adapter, model, None, f"{path} + {file}")
    for entry, file in states.items():
        own, _, adapter = entry.partition(":")
        model = served[adapter or name].model
        served[own] = Served(
            own, model, adapter_files.load_state(file, model, path), f"{served[adapter or name].source} + {file}"
        )
    return served


def initial_state(served: Served, dtype: torch.dtype | None = None) -> State:
    """The state before the first token, batch size 1.

    Args:
        dtype: of matmuls, if not fp32.
    """
    weight = served.model.ln_out.weight
    state = served.model.initial_state(1, torch.empty(0, device=weight.device, dtype=dtype or weight.dtype))
    if served.state is None:
        return state
    return tuple((att, tuned[1], ffn) for (att, _, ffn), tuned in zip(state, served.state, strict=True))
