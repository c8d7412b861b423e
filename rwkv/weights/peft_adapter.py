"""LoRA adapters of Hugging Face's peft: a folder with adapter_config.json and
adapter_model.safetensors or .bin.
"""

import math
import os
from pathlib import Path
from typing import Any

from rwkv.errors import UserError, printable
from rwkv.weights.manifest import is_number, read_json

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def file_of(path: Path) -> Path:
    """The file with the tensors if `path` is a peft folder, else `path`. Raises UserError if the
    folder has none.
    """
    if not os.path.isfile(path / CONFIG):
        return path
    found = next((path / name for name in _FILES if os.path.isfile(path / name)), None)
    if found is None:
        raise UserError(f"{path}: has {CONFIG}, but neither {' nor '.join(_FILES)}; copy the whole folder")
    return found


def config_of(path: Path) -> Path | None:
    """The adapter_config.json of a peft folder or of the tensors file in it; None for other
    files.
    """
    if os.path.isdir(path):
        return path / CONFIG if os.path.isfile(path / CONFIG) else None
    return path.parent / CONFIG if path.name in _FILES and os.path.isfile(path.parent / CONFIG) else None


def read_config(config: Path) -> dict[str, Any]:
    """Read r and alpha from adapter_config.json, in the form of our manifests.

    Raises:
        UserError: not LoRA, or LoRA with a feature that is not supported here, by its key in the
            file.
    """
    found = read_json(config)
    kind = found.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{config}: describes an adapter of type {_shown(kind)}, but only LORA is supported; merge it with peft, and use the merged model"
        )
    initial = found.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise UserError(
            f"{config}: initialised with init_lora_weights {_shown(initial)}, which changes the base as well; convert it with peft"
            " (save_pretrained with path_initial_model_for_weight_conversion), or merge it with peft and use the merged model"
        )
    for key, meaning in {
        "use_qalora": "QALoRA",
        "fan_in_fan_out": "transposed layers",
        "lora_bias": "biases",
        "rank_pattern": "ranks that differ between layers",
        "alpha_pattern": "alphas that differ between layers",
        "modules_to_save": "fully trained layers",
        "target_parameters": "parameters as targets",
        "trainable_token_indices": "trained tokens",
        "layer_replication": "replicated layers",
        "megatron_config": "Megatron's layers",
        "alora_invocation_tokens": "activated LoRA",
    }.items():
        if found.get(key):
            raise UserError(
                f"{config}: has {key} ({meaning}), which is not supported here; merge it with peft (merge_and_unload), and use the merged model"
            )
    if found.get("bias", "none") != "none":
        raise UserError(
            f"{config}: trains biases (bias is {_shown(found['bias'])}), but RWKV's linear layers have none; merge it with peft, and use the merged model"
        )
    r, alpha = found.get("r"), found.get("lora_alpha")
    if type(r) is not int or r < 1:
        raise UserError(
            f"{config}: its r is {_shown(r)}, not a positive integer; fix it, or copy the adapter's folder again"
        )
    if alpha is None or not is_number(alpha):
        raise UserError(
            f"{config}: its lora_alpha is {_shown(alpha)}, not a number; fix it, or copy the adapter's folder again"
        )
    return {"r": r, "alpha": alpha * math.sqrt(r) if found.get("use_rslora") else alpha}


def _shown(value: Any) -> str:
    return type(value).__name__ if isinstance(value, dict | list) else printable(repr(value)[:80])
