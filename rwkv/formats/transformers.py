"""Folders of transformers and flash-linear-attention: tensor names and config.json.

- RWKV-4: RwkvForCausalLM of transformers.
- RWKV-7, layout "fla": RWKV7ForCausalLM of flash-linear-attention, as in the fla-hub/rwkv7-*
  folders; also read by PyPI's rwkv7-hf and by llama.cpp's converter. Low-rank matrices are
  transposed, vectors are flat, and block 0 has no v0, v1, v2.
- RWKV-7, layout "transformers": the official RWKV/RWKV7-* folders (Rwkv7ForCausalLM of pull request
  47780 of transformers): BlinkDL's names with the prefix `rwkv7.`, except for the head's. Block 0
  has v0, v1 and v2, unused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rwkv.errors import UserError
from rwkv.formats.lazy import Lazy

RWKV4_NAMES = (
    ("blocks.", "rwkv.blocks."),
    ("emb.", "rwkv.embeddings."),
    ("ln_out.", "rwkv.ln_out."),
    (".ln0.", ".pre_ln."),
    (".att.", ".attention."),
    (".ffn.", ".feed_forward."),
    ("time_mix_k", "time_mix_key"),
    ("time_mix_v", "time_mix_value"),
    ("time_mix_r", "time_mix_receptance"),
)
"""Substrings of BlinkDL's and of transformers' RWKV-4 tensor names, to be replaced in this
order.
"""

_FLA_NAMES = (
    (".emb.", ".embeddings."),
    (".head.", ".lm_head."),
    (".ln_out.", ".norm."),
    (".blocks.", ".layers."),
    (".ln0.", ".pre_norm."),
    (".ln1.", ".attn_norm."),
    (".ln2.", ".ffn_norm."),
    (".att.", ".attn."),
    (".attn.receptance.", ".attn.r_proj."),
    (".attn.key.", ".attn.k_proj."),
    (".attn.value.", ".attn.v_proj."),
    (".attn.output.", ".attn.o_proj."),
    (".attn.ln_x.", ".attn.g_norm."),
    *(
        (f".attn.{letter}{number}.", f".attn.{letter}_lora.lora.{parameter}.")
        for letter in "wavg"
        for number, parameter in enumerate(("2.bias", "0.weight", "2.weight"))
    ),
)
"""Parts of BlinkDL's and of flash-linear-attention's RWKV-7 tensor names, to be replaced in this
order, and in the reverse order to read them.
"""
_LOW_RANK = re.compile(r"\.att\.[wavg][12]$")
_FLAT_IN_FLA = re.compile(r"\.att\.([wav]0|k_k|k_a)$|\.ffn\.x_k$")
_VECTOR = re.compile(r"\.att\.(x_[rwkvag]|[wav]0|k_k|k_a)$|\.ffn\.x_k$")
UNUSED = re.compile(r"^blocks\.0\.att\.v[012]$")  # in RWKV-7: block 0 has no block before it
HEAD_SIZE = 64
"""The only head size of RWKV-7 in these layouts: they normalise heads with an epsilon of
head size · 1e-5, BlinkDL's models with 64e-5.
"""


def rwkv4_name(name: str) -> str:
    """transformers' name of an RWKV-4 tensor or layer."""
    for ours, theirs in RWKV4_NAMES:
        name = name.replace(ours, theirs)
    return name


def fla_name(name: str) -> str:
    """flash-linear-attention's name of an RWKV-7 tensor."""
    name = f".{name}."
    for ours, theirs in _FLA_NAMES:
        name = name.replace(ours, theirs)
    name = name.strip(".")
    return name if name.startswith("lm_head.") else f"model.{name}"


def _from_fla_name(name: str) -> str:
    """The reverse of fla_name, also for the names of peft adapters and of the model without its
    head.
    """
    name = f".{name.removeprefix('base_model.model.').removeprefix('model.')}."  # the first is peft's
    for ours, theirs in reversed(_FLA_NAMES):
        name = name.replace(theirs, ours)
    return name.strip(".")


def to_rwkv4(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """RWKV-4 in the layout of transformers."""
    return {rwkv4_name(name): tensor for name, tensor in tensors.items()}


def to_fla(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """RWKV-7 in the layout of flash-linear-attention."""
    found = {}
    for name, tensor in tensors.items():
        if UNUSED.search(name):
            continue
        if _LOW_RANK.search(name):
            tensor = tensor.then(lambda x: x.t())
        elif _FLAT_IN_FLA.search(name):
            tensor = tensor.then(lambda x: x.reshape(-1))
        found[fla_name(name)] = tensor
    return found


def is_fla(names: Mapping[str, Any]) -> bool:
    """Whether tensor names are those of RWKV-7 in flash-linear-attention, or of a peft adapter on
    it.
    """
    pattern = r"(^|\.)layers\.\d+\.(attn\.k_k$|(attn\.[rkvo]_proj|ffn\.(key|value))\.lora_[AB]\.)"
    return any(re.search(pattern, name) for name in names)


def from_fla(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of to_fla, also for its older layout with one `x_x` [6, C] a block. Transposed
    tensors are views.
    """
    found = {}
    for name, tensor in tensors.items():
        name = _from_fla_name(name)
        if name.endswith(".att.x_x") and tensor.dim() and tensor.shape[0] == 6:
            for letter, row in zip("rwkvag", tensor, strict=True):
                found[f"{name[:-1]}{letter}"] = row.reshape(1, 1, -1)
        elif _LOW_RANK.search(name) and tensor.dim() == 2:
            found[name] = tensor.t()
        else:
            found[name] = tensor.reshape(1, 1, -1) if _VECTOR.search(name) else tensor
    return found


def to_official(tensors: Mapping[str, Lazy], sizes: Any) -> dict[str, Lazy]:
    """RWKV-7 in the layout of the official RWKV/RWKV7-* folders."""
    like = tensors["blocks.0.att.a0"]
    width, rank = like.shape[-1], sizes.rank_v
    shapes = {"v0": (1, 1, width), "v1": (width, rank), "v2": (rank, width)}
    unused = {f"blocks.0.att.{name}": Lazy.of(torch.zeros(shape, dtype=like.dtype)) for name, shape in shapes.items()}
    every = {**unused, **tensors}
    return {name if name.startswith("head.") else f"rwkv7.{name}": tensor for name, tensor in every.items()}


def rwkv4_config(sizes: Any, ctx_len: int) -> dict[str, Any]:
    """config.json of an RWKV-4 model.

    Raises:
        UserError: transformers does not support the model.
    """
    if sizes.pre_ffn:
        raise UserError(
            "transformers' RWKV does not support --pre_ffn 1 (a channel-mix instead of the first time-mix); export to .pth or .safetensors"
        )
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.n_embd,
        "num_hidden_layers": sizes.n_layer,
        "attention_hidden_size": sizes.dim_att,
        "intermediate_size": sizes.dim_ffn,
        "layer_norm_epsilon": 1e-5,
        "context_length": ctx_len,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }


def _rwkv7_config(sizes: Any, ctx_len: int) -> dict[str, Any]:
    """Entries of config.json that both layouts of RWKV-7 share."""
    if sizes.head_size != HEAD_SIZE:
        raise UserError(
            f"the head size is {sizes.head_size}, but transformers folders of RWKV-7 have {HEAD_SIZE}: with others their"
            " normalisation differs from BlinkDL's; export to .pth or .safetensors"
        )
    return {
        "model_type": "rwkv7",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.dim_ffn,
        "num_hidden_layers": sizes.n_layer,
        "head_dim": sizes.head_size,
        "num_heads": sizes.heads,
        "decay_low_rank_dim": sizes.rank_w,
        "a_low_rank_dim": sizes.rank_a,
        "v_low_rank_dim": sizes.rank_v,
        "gate_low_rank_dim": sizes.rank_g,
        "norm_eps": 1e-5,
        "norm_bias": True,
        "max_position_embeddings": ctx_len,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def fla_config(sizes: Any, ctx_len: int) -> dict[str, Any]:
    """config.json of an RWKV-7 model in the layout of flash-linear-attention. Raises UserError if
    the head size is not 64.
    """
    return {
        "architectures": ["RWKV7ForCausalLM"],
        **_rwkv7_config(sizes, ctx_len),
        "attn": None,
        "attn_mode": "chunk",
        "fuse_cross_entropy": True,
        "fuse_norm": False,
        "hidden_act": "sqrelu",
        "hidden_ratio": sizes.dim_ffn / sizes.n_embd,
        "initializer_range": 0.02,
        "norm_first": True,
        "value_dim": [sizes.n_embd] * sizes.n_layer,
    }


def official_config(sizes: Any, ctx_len: int) -> dict[str, Any]:
    """config.json of an RWKV-7 model in the official folders' layout. Raises as fla_config."""
    return {"architectures": ["Rwkv7ForCausalLM"], **_rwkv7_config(sizes, ctx_len)}


@dataclass(frozen=True)
class Layout:
    """A kind of folder for models of one version.

    Attributes:
        convert: tensors under BlinkDL's names, and the model's sizes → tensors in this layout.
        config: sizes and ctx_len → config.json. Raises UserError if the layout cannot represent the
            model.
        reader: the class of transformers that reads the folder; empty: transformers has none.
    """

    convert: Callable[[Mapping[str, Lazy], Any], dict[str, Lazy]]
    config: Callable[[Any, int], dict[str, Any]]
    reader: str = ""


LAYOUTS = {
    "4": {"transformers": Layout(lambda tensors, sizes: to_rwkv4(tensors), rwkv4_config, "RwkvForCausalLM")},
    "7": {
        "fla": Layout(lambda tensors, sizes: to_fla(tensors), fla_config),
        "transformers": Layout(to_official, official_config),
    },
}
"""Layouts by version and name; the first one of a version is its default."""


def check_config(config: Mapping[str, Any], where: Any) -> None:
    """Check the config.json of a folder that is read. Raises UserError for an RWKV-7 model with
    another normalisation.
    """
    head, epsilon = config.get("head_dim", HEAD_SIZE), config.get("norm_eps", 1e-5)
    if config.get("model_type") == "rwkv7" and not (
        all(isinstance(value, int | float) and 0 < value < 1e6 for value in (head, epsilon))
        and abs(head * epsilon / 64e-5 - 1) < 1e-3
    ):
        raise UserError(
            f"{where}: heads of {head} channels, normalised with epsilon {head} · {epsilon}; only BlinkDL's 64e-5 is supported;"
            " use the .pth that it was converted from"
        )
