"""Identify a dictionary of tensors by names and shapes: RWKV version, adapter, tuned state, another
architecture.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from rwkv.errors import printable
from rwkv.formats.transformers import RWKV4_NAMES

# Prefixes added by wrappers: DataParallel, DeepSpeed, torch.compile, FSDP, Lightning modules, peft.
_WRAPPERS = r"(?:module|model|net|network|rwkv7?|transformer|backbone|base_model|_forward_module|_orig_mod|_fsdp_wrapped_module)"
_PREFIX = re.compile(rf"^(?:{_WRAPPERS}\.)+(?=(?:emb|head|ln_out|blocks|embeddings)\.)")
_INSIDE = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PEFT = re.compile(r"\.lora_([AB])(?:\.(?!weight$)\w+)?\.weight$")

SUPPORTED = "RWKV-4, RWKV-5.2 (x052), RWKV-6 (x060) and RWKV-7 (x070) models"

USE_ADAPTER = "pass the rwkv-N.pth of a LoRA run, or a folder written by peft"

# Regular expressions of tensor names, what a file with such a tensor is, and what to do.
_ADAPTER_FILES = (
    (
        r"\.(bone|disha|miss)$",
        "an adapter of Bone, DiSHA or MiSS (RWKV-PEFT), which is not LoRA and cannot be used here. Merge it with RWKV-PEFT, and use the"
        " merged model",
    ),
    (
        r"\.init_lora_[AB]$",
        "the initial matrices of PiSSA (RWKV-PEFT), which are not an adapter. Merge the adapter with RWKV-PEFT, and use the merged model",
    ),
    (
        r"\.(hada_w1_[ab]|lokr_w1|oft_r|vera_lambda_[bd]|ia3_l|lora_embedding_[AB]|lora_E)\b",
        "an adapter that is not LoRA on weight matrices. Merge it with the program that wrote it, and use the merged model",
    ),
    (
        r"\.ts_state$",
        "a tuned state with token shifts (RWKV-PEFT's fullstate: ts_state), which cannot be used here; only WKV's state (time_state) can. Use it"
        " with the program that wrote it",
    ),
)
_OTHER_MODELS = (
    (
        r"\.weight_(mx|rx|my|ry)$|\.weight_scale|_(mx|rx|my|ry)$",
        "a model quantised to 8 bits for inference (PyPI rwkv's fp16i8). Use the .pth that it was converted from",
    ),
    (
        r"\.(qweight|qzeros|g_idx|absmax|quant_map|scales|SCB|weight_format)$|quant_state",
        "a quantised model (GPTQ, AWQ or bitsandbytes). Use the original, in fp32, bf16 or fp16",
    ),
    (
        r"^(model\.)?layers\.\d+\.attn\.(r_proj|x_r|x_proj)",
        "an RWKV-6 model, or a part of an RWKV-7 model, with the tensor names of flash-linear-attention. Of these, only"
        " whole RWKV-7 models can be read; use the .pth that it was converted from",
    ),
    (
        r"^(token_embd|blk\.\d+\.)",
        "a model with the tensor names of GGUF (llama.cpp). Use the .pth that it was converted from",
    ),
)


def upstream_name(name: str) -> str:
    """BlinkDL's name for a tensor name of a wrapper, peft or transformers.

    Examples: `module.blocks.0.…`, `….lora_A.default.weight`, `rwkv.blocks.0.attention.…`,
    `rwkv7.blocks.0.att.…`.
    """
    name = _PREFIX.sub("", _INSIDE.sub("", name))
    name = _PEFT.sub(r".lora_\1", name)
    name = re.sub(r"\.(lora_magnitude_vector)\.(?:\w+\.)?weight$", r".\1", name)
    if re.match(r"(?:blocks\.\d+\.(?:attention|feed_forward|pre_ln)|embeddings)\.", name):
        for ours, theirs in RWKV4_NAMES:
            name = name.replace(theirs.removeprefix("rwkv."), ours)
    return name


def why_not_model(tensors: Mapping[str, Tensor]) -> str | None:
    """What the tensors are and what to do, if they are known to be something else than a supported
    model; else None.
    """
    if part := _first(_ADAPTER_FILES, tensors):
        return part
    if tensors and all(name.endswith(".time_state") for name in tensors):
        return (
            "a tuned state (state tuning: only time_state), not a model. Pass the model that it was trained for, and this file as --state; or write"
            " both into one file with scripts/merge_lora.py"
        )
    if any(".lora_" in name for name in tensors):
        if "emb.weight" in tensors:
            return "a model together with a LoRA adapter that is not merged; merge it with the program that wrote it, or use its base model"
        return (
            "a LoRA adapter, not a model. Use its base model; if a program does not accept an adapter, merge"
            " both first with scripts/merge_lora.py, and use the merged model"
        )
    return _version(tensors) or _other_model(tensors)


def why_not_adapter(tensors: Mapping[str, Tensor], fully_trained: Callable[[str], bool]) -> str | None:
    """What the tensors are (if known) and what to do, if they are not a LoRA adapter; else None.

    Args:
        fully_trained: whether an adapter can have a tensor of this name beside lora_A, lora_B and
            lora_magnitude_vector (DoRA).
    """
    if found := _first(_ADAPTER_FILES, tensors):
        return found
    if any(name in tensors for name in ("emb.weight", "head.weight")):
        version = _version(tensors) or "a whole model"
        return (
            f"not a LoRA adapter but {version}. An adapter has only lora_A and lora_B, and some vectors; {USE_ADAPTER}"
        )
    unknown = [
        name for name in tensors if not (re.search(r"\.lora_([AB]|magnitude_vector)$", name) or fully_trained(name))
    ]
    if unknown:
        return (
            f"not a LoRA adapter ({_list_names(unknown)} is not part of one); {USE_ADAPTER}"
            if len(unknown) < len(tensors)
            else _not_adapter(tensors)
        )
    return None


def _any_matches(tensors: Iterable[str], pattern: str) -> bool:
    return any(re.search(pattern, name) for name in tensors)


def _first(table: Iterable[tuple[str, str]], names: Iterable[str]) -> str | None:
    """The text of the first row whose regular expression matches one of the names."""
    return next((text for pattern, text in table if _any_matches(names, pattern)), None)


def _version(tensors: Mapping[str, Tensor]) -> str | None:
    """An RWKV model of an unsupported version, or RWKV-4 with unsupported parts; else None."""
    train = f"; only {SUPPORTED} are supported here"
    layer = r"^blocks\.\d+\."
    tests = (
        (rf"{layer}ffn\.enn\.", 'RWKV-8 ("Heron", a research version)'),
        (rf"{layer}qkv\.", "RWKV-7b (DEA attention, a research version)"),
        (rf"{layer}ffn\.s_emb", "RWKV-7a (DeepEmbed)"),
        (rf"{layer}att\.(r_k|k_k|x_r|w0)$", ""),  # RWKV-7 (x070)
        (rf"{layer}att\.time_maa_rkvw_w1$", "an experimental version of RWKV-6 (x060b or x060c)"),
        (rf"{layer}att\.gate_w1$", "an experimental version of RWKV-6 (x060a)"),
        (rf"{layer}att\.time_maa", ""),  # RWKV-6 (x060)
    )
    for pattern, name in tests:
        if _any_matches(tensors, pattern) and not name:
            return None
        if _any_matches(tensors, pattern):
            return f"an {name} model{train}" if name[0] == "R" else f"{name}{train}"
    decay = next((tensor for name, tensor in tensors.items() if re.search(rf"{layer}att\.time_decay$", name)), None)
    if _any_matches(tensors, rf"{layer}att\.gate\.weight$"):
        later = decay is not None and decay.dim() >= 2 and decay.shape[1] > 1
        return None if later else f"an RWKV-5.1 model{train}"  # RWKV-5.2 (x052)
    if _any_matches(tensors, rf"{layer}att\.ln_x\."):
        return f"an RWKV-5.0 model{train}"
    if decay is not None and decay.dim() != 1:
        return f"an RWKV model of version 5 or later (att.time_decay is not a vector){train}"
    if _any_matches(tensors, r"^head_[qk]\.weight$|\.tiny_"):
        return "an RWKV-4 model with head_q and head_k or with tiny attention, which are not supported"
    if _any_matches(tensors, rf"{layer}att\.time_(w|ww|alpha|beta|gamma|curve)$"):
        return f"an RWKV model of a version before 4{train}"
    return None


def _other_model(tensors: Mapping[str, Tensor]) -> str | None:
    names = list(tensors)
    if found := _first(_OTHER_MODELS, names):
        return found
    if _any_matches(
        names,
        r"layers\.\d+\.(self_attn|mixer|attention)\.|^(transformer\.)?h\.\d+\.|^gpt_neox\.|encoder\.layer\.\d+|^(unet|vae|first_stage_model|cond_stage_model)\.",
    ):
        return f"a model of another architecture, not RWKV (its tensors are {_list_names(names)})"
    if names and all(tensor.numel() == 0 for tensor in tensors.values()):
        return (
            "a checkpoint whose weights are in other files (its tensors are empty: DeepSpeed's ZeRO stage 3). Merge them with the zero_to_fp32.py that"
            " is beside it, and use its output"
        )
    return None


def _not_adapter(tensors: Mapping[str, Tensor]) -> str:
    return _other_model(tensors) or f"not a LoRA adapter (its tensors are {_list_names(list(tensors))}); {USE_ADAPTER}"


def _list_names(names: list[str]) -> str:
    return ", ".join(printable(name)[:100] for name in sorted(names)[:3]) + (", …" if len(names) > 3 else "")
