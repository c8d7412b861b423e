"""GGUF files of RWKV-6 and 7 for llama.cpp and programs on top of it, such as Ollama and LM Studio.

Names and shapes are those of llama.cpp's converter. Vectors, and matrices that llama.cpp reads in
fp32 only, are F32; the other matrices F32, F16, BF16 or Q8_0 (rwkv.formats.gguf_file).
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv.formats import gguf_file
from rwkv.formats.hf_tokenizer import CHAT_TEMPLATE
from rwkv.formats.lazy import Lazy

TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
_CONTEXT = 1 << 20  # the model itself has no limit; the number is the converter's
_END_OF_TURN = 261  # "\n\n", after which a chat's turn ends
# llama.cpp evaluates it as Jinja; by its comment, versions without Jinja know the format.
_CHAT_TEMPLATE = "{#- rwkv-world -#}" + CHAT_TEMPLATE
_NAMES = (
    (r"^emb\.", "token_embd."),
    (r"^head\.", "output."),
    (r"^ln_out\.", "output_norm."),
    (r"^blocks\.0\.ln0\.", "token_embd_norm."),
    (r"^blocks\.", "blk."),
    (r"\.ln1\.", ".attn_norm."),
    (r"\.ln2\.", ".attn_norm_2."),
    (r"\.att\.ln_x\.", ".time_mix_ln."),
    (r"\.att\.time_maa_x$", ".time_mix_lerp_x.weight"),
    (r"\.att\.time_maa_(w[12])$", r".time_mix_\1.weight"),
    (r"\.att\.time_faaaa$", ".time_mix_first.weight"),
    (r"\.att\.time_(decay\w*)$", r".time_mix_\1.weight"),
    (r"\.ffn\.(?:time_maa|x)_([kr])$", r".channel_mix_lerp_\1.weight"),
    (r"\.att\.([wavg][012]|[kr]_[ka])$", r".time_mix_\1.weight"),
    (r"\.att\.", ".time_mix_"),
    (r"\.ffn\.", ".channel_mix_"),
)
_TRANSPOSED = re.compile(r"\.att\.([wavg][12]|time_maa_w[12]|time_decay_w[12])$")
_MIXED = re.compile(r"(.*\.att\.)(?:x|time_maa)_([rwkvag])$")
_ORDER = {"x": "rwkvag", "time_maa": "wkvrg"}
_ALWAYS_F32 = re.compile(r"time_mix_(first|w[12]|decay_w[12]|lerp_fused)\.weight$|_norm\.weight$")
_FILE_TYPES = {"fp32": 0, "fp16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # of tokens

VERSIONS: dict[str, Callable[[Any], dict[str, int]]] = {
    "6": lambda sizes: {
        "time_mix_extra_dim": sizes.rank_mix,
        "time_decay_extra_dim": sizes.rank_w,
        "rescale_every_n_layers": 0,
    },
    "7": lambda sizes: {
        "attention.decay_lora_rank": sizes.rank_w,
        "attention.iclr_lora_rank": sizes.rank_a,
        "attention.value_residual_mix_lora_rank": sizes.rank_v,
        "attention.gate_lora_rank": sizes.rank_g,
    },
}
"""The versions that llama.cpp has, each with its own metadata, from the model's sizes."""


def convert(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """A model of RWKV-6 or 7 under llama.cpp's names and in its shapes, in its own dtypes."""
    found: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        if re.match(r"blocks\.0\.att\.v[012]$", name):  # not used
            continue
        if match := _MIXED.match(name):
            kind = "x" if f"{match[1]}x_r" in tensors else "time_maa"
            parts = [tensors[f"{match[1]}{kind}_{letter}"] for letter in _ORDER[kind]]
            fused = re.sub(r"^blocks\.(\d+)\.att\.$", r"blk.\1.time_mix_lerp_fused.weight", match[1])
            if fused not in found:
                found[fused] = Lazy.stack(parts).then(lambda x: x.reshape(x.shape[0], 1, 1, -1))
            continue
        if _TRANSPOSED.search(name):
            tensor = tensor.then(lambda x: x.transpose(-2, -1))
        elif name.endswith(".att.r_k") or (len(tensor.shape) == 3 and tensor.shape[:2] == (1, 1)):
            tensor = tensor.then(lambda x: x.reshape(-1))
        theirs = _name(name)
        found[theirs] = tensor
        if match := re.match(r"blk\.0\.time_mix_a([012])\.weight$", theirs):
            # llama.cpp requires v0, v1 and v2 in block 0 too, without using their values
            found[f"blk.0.time_mix_v{match[1]}.weight"] = tensor
    return found


def _name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def restore(found: Mapping[str, Lazy], shapes: Mapping[str, torch.Size]) -> dict[str, Lazy]:
    """The reverse of `convert`.

    Args:
        shapes: of the model's parameters, under BlinkDL's names.
    """
    restored = {}
    for name, shape in shapes.items():
        if re.match(r"blocks\.0\.att\.v[012]$", name):
            restored[name] = Lazy.of(torch.zeros(shape))
        elif match := _MIXED.match(name):
            kind = "x" if f"{match[1]}x_r" in shapes else "time_maa"
            fused = re.sub(r"^blocks\.(\d+)\.att\.$", r"blk.\1.time_mix_lerp_fused.weight", match[1])
            restored[name] = found[fused].then(functools.partial(_row, _ORDER[kind].index(match[2]), shape))
        elif _TRANSPOSED.search(name):
            restored[name] = found[_name(name)].then(lambda x: x.transpose(-2, -1))
        else:
            restored[name] = found[_name(name)].then(functools.partial(torch.reshape, shape=shape))
    return restored


def _row(number: int, shape: torch.Size, fused: Tensor) -> Tensor:
    return fused[number].reshape(shape)


def type_of(name: str, shape: Sequence[int], dtype: str) -> str:
    """The type of a tensor in a file of matrices of `dtype` (fp32, fp16, bf16 or q8_0). Q8_0 needs
    rows of a multiple of 32; other matrices of such a file are F16.
    """
    if len(shape) < 2 or _ALWAYS_F32.search(name):
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % gguf_file.BLOCK else TYPES[dtype]


def write(
    path: Path, tensors: Mapping[str, Lazy], version: str, sizes: Any, dtype: str, name: str, tokens: Sequence[bytes]
) -> None:
    """Write tensors of `convert` into an existing file, one by one.

    Args:
        dtype: of matrices: fp32, fp16, bf16 or q8_0.
        name: the model's name in the file.
        tokens: the bytes of every id of the World vocabulary; empty for ids that are not used.

    Raises:
        UserError: a value overflows in this dtype.
        OSError: the disk is full.
    """
    types = {key: type_of(key, lazy.shape, dtype) for key, lazy in tensors.items()}
    gguf_file.write(
        path, _metadata(version, sizes, dtype, name) | _vocabulary(sizes.vocab_size, tokens), tensors, types
    )


def _metadata(version: str, sizes: Any, dtype: str, name: str) -> dict[str, Any]:
    kind = f"rwkv{version}"
    model = {
        "context_length": _CONTEXT,
        "embedding_length": sizes.n_embd,
        "block_count": sizes.n_layer,
        "feed_forward_length": sizes.dim_ffn,
        "attention.head_count": 0,  # required, not used
        "attention.layer_norm_epsilon": 1e-5,
        "wkv.head_size": sizes.head_size,
        **VERSIONS[version](sizes),
    }
    return {
        "general.architecture": kind,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,
        **{f"{kind}.{key}": value for key, value in model.items()},
    }


def _vocabulary(vocab_size: int, tokens: Sequence[bytes]) -> dict[str, Any]:
    """The World vocabulary as llama.cpp's converter writes it: Python's escapes of the bytes."""
    texts, kinds = [b"<s>"], [_CONTROL]
    for number in range(1, vocab_size):
        token = tokens[number] if number < len(tokens) else b""
        texts.append(repr(token)[2:-1].encode() if token else f"[PAD{number}]".encode())
        kinds.append(_NORMAL if token else _UNUSED)
    return {
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": _END_OF_TURN if vocab_size > _END_OF_TURN else 0,
        "tokenizer.chat_template": _CHAT_TEMPLATE,
    }
