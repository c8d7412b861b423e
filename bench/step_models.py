"""The models of bench/step.py: random weights, those of transformers and peft, sizes of matmuls."""

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rwkv import checkpoint
from rwkv.files import atomic_write, write_json
from rwkv.formats import transformers
from rwkv.formats.lazy import Lazy
from rwkv.models import RWKV, version


def sizes(c: argparse.Namespace) -> Any:
    layers, width, vocab = c.sizes
    return version.named(c.version).Sizes(n_layer=layers, n_embd=width, vocab_size=vocab)


def matrices(of: Any) -> list[tuple[int, int]]:
    """(out, in) of every matmul with weights in the blocks, for one token."""
    by_head = (".r_k", ".time_faaaa", ".time_decay")
    found = []
    for name, parameter in RWKV(of, device="meta").named_parameters():
        shape = tuple(parameter.shape)
        if not name.startswith("blocks.") or name.endswith(by_head):
            continue
        if name.endswith(".weight") and len(shape) == 2:
            found.append(shape)
        elif len(shape) == 2 or (len(shape) == 3 and min(shape) > 1):  # low-rank matrices are transposed, RWKV-6's also
            found += [(shape[-1], shape[-2])] * (shape[0] if len(shape) == 3 else 1)  # in groups
    return found


def write(c: argparse.Namespace, dtype: torch.dtype) -> None:
    """Write random weights to c.folder/base.pth and, for transformers, to c.folder/hf."""
    model = RWKV(sizes(c))
    (_fill_4 if c.version == "4" else _fill_new)(model, torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    folder = Path(c.folder)
    checkpoint.save_model(folder / "base.pth", model, {})
    if not c.ours and c.version in THEIRS:
        (folder / "hf").mkdir()
        THEIRS[c.version]().write(folder / "hf", model, c.ctx_len, dtype)
    for path in folder.rglob("*.*"):
        if path.is_file():
            # evict from the page cache: a file just written would have larger folios than one read
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fill_4(model: RWKV, generator: torch.Generator) -> None:
    constants = {"time_first": -1.2, "weight": 1.0, "bias": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            value = torch.empty(parameter.shape).normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        elif "decay" in name:
            value = torch.linspace(-5, 3, len(parameter))
        else:
            value = torch.full(parameter.shape, constants.get(name.split(".")[-1], 0.5))
        parameter.data = value


def _fill_new(model: RWKV, generator: torch.Generator) -> None:
    """As a new model; no matrix is zero, as after some training."""
    torch.manual_seed(0)
    model.initialise(1e-4)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.add_(
                torch.empty(parameter.shape).normal_(0, 0.3 * parameter.shape[-1] ** -0.5, generator=generator)
            )


class Transformers:
    """RWKV-4 in transformers."""

    targets = r".*\.attention\.(key|value|receptance)"

    def write(self, folder: Path, model: RWKV, ctx_len: int, dtype: torch.dtype) -> None:
        with atomic_write(folder / "model.safetensors") as temporary:
            tensors = {name: Lazy.of(parameter.detach()) for name, parameter in model.named_parameters()}
            checkpoint.save_safetensors(transformers.to_rwkv4(tensors), temporary)
        config = transformers.rwkv4_config(model.sizes, ctx_len)
        write_json(folder / "config.json", {**config, "torch_dtype": str(dtype).removeprefix("torch.")})

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        from transformers import RwkvForCausalLM

        return RwkvForCausalLM.from_pretrained(folder, torch_dtype=dtype, rescale_every=0, use_cache=False)

    def adapt(self, model: nn.Module, r: int, alpha: int, dropout: float) -> nn.Module:
        """The model with peft's LoRA."""
        import peft

        config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=self.targets)
        return peft.get_peft_model(model, config)


class RwkvHf(Transformers):
    """RWKV-7 in PyPI's rwkv7-hf, beside the environment (tests/oracle.txt)."""

    targets = r".*\.attn\.[rkvo]_proj"

    def __init__(self):
        path = Path(sys.prefix) / "oracle"
        if not (path / "rwkv7_hf").is_dir():
            sys.exit("the package rwkv7-hf is missing; make test installs it")
        sys.path.append(str(path))  # last: it also has another `rwkv`

    def write(self, folder: Path, model: RWKV, ctx_len: int, dtype: torch.dtype) -> None:
        converter = importlib.import_module("rwkv7_hf.converter")
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        config = converter.infer_config(weights, str(dtype).removeprefix("torch."), "reference", False)
        theirs = self._class()(config).to(dtype)
        named = dict(theirs.named_parameters())
        for name, weight in weights.items():
            other, transposed = converter.translate_name(name, config.num_hidden_layers)
            target = named.pop(other)
            target.data.copy_((weight.t() if transposed else weight).reshape(target.shape))
        assert not named, named.keys()
        theirs.save_pretrained(folder)

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        model = self._class().from_pretrained(folder, torch_dtype=dtype)
        model.config.use_cache = False
        return model

    def _class(self) -> Any:
        return importlib.import_module("rwkv7_hf.modeling_rwkv7").RWKV7ForCausalLM


THEIRS = {"4": Transformers, "7": RwkvHf}
