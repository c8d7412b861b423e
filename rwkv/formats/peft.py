"""Adapter folders of Hugging Face's peft: tensor names and adapter_config.json.

Layers have the names of the models that peft adapts: of RWKV-4 in transformers, of RWKV-7 in
flash-linear-attention (and rwkv7-hf), of other versions those of RWKV-PEFT, which are BlinkDL's.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from rwkv.errors import UserError
from rwkv.formats import transformers
from rwkv.formats.lazy import Lazy

_NAMES: dict[str, Callable[[str], str]] = {"4": transformers.rwkv4_name, "7": transformers.fla_name}
"""Functions that rename a weight, by version; other versions keep BlinkDL's names."""


def convert(tensors: Mapping[str, Lazy], version: str) -> dict[str, Lazy]:
    """The lora_A and lora_B of an adapter, and DoRA's magnitudes, under peft's names.

    Raises:
        UserError: the adapter also trains vectors, which peft cannot load.
    """
    found = {}
    for name, tensor in tensors.items():
        layer, adapted, half = name.rpartition(".lora_")
        if not adapted:
            raise UserError(
                f"the adapter also trains {name}, which peft's adapters cannot hold; merge it (--lora with another format), or train with"
                " --lora_parts att,ffn only"
            )
        end = "" if half == "magnitude_vector" else ".weight"
        found[f"base_model.model.{_layer(layer, version)}.lora_{half}{end}"] = tensor
    return found


def _layer(name: str, version: str) -> str:
    rename = _NAMES.get(version)
    return rename(f"{name}.weight").removesuffix(".weight") if rename else name


def config(names: Mapping[str, Any], r: int, alpha: float, base: str | None) -> dict[str, Any]:
    """adapter_config.json.

    Args:
        names: of the tensors, from `convert`.
        base: path or name of the base, for information.
    """
    layers = {re.sub(r".*\.\d+\.(.*)\.lora_(?:[AB]\.weight|magnitude_vector)$", r"\1", name) for name in names}
    dora = any(name.endswith(".lora_magnitude_vector") for name in names)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(layers),
        "bias": "none",
        **({"use_dora": True} if dora else {}),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
