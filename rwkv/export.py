"""Export a checkpoint for other programs: in another dtype, or as a folder for transformers'
RwkvForCausalLM.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv import checkpoint
from rwkv.errors import UserError
from rwkv.models import RWKV
from rwkv.weights.kinds import TRANSFORMERS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tensors_of(model: RWKV, dtype: str) -> dict[str, Tensor]:
    """All weights under BlinkDL's names.

    Args:
        dtype: fp32, bf16 or fp16; `keep`: unchanged.

    Raises:
        UserError: a weight overflows in this dtype.
    """
    tensors = {
        name: p.detach() if dtype == "keep" else p.detach().to(DTYPES[dtype]) for name, p in model.named_parameters()
    }
    if overflowed := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{overflowed[0]} is not finite in {dtype}; use --dtype bf16 or fp32")
    return tensors


def transformers_config(model: RWKV, ctx_len: int, dtype: torch.dtype) -> dict[str, Any]:
    """The model's config.json for transformers.

    Raises:
        UserError: transformers does not support the model.
    """
    try:
        config = model.version.transformers_config(model.sizes)
    except ValueError as error:
        raise UserError(f"{error}; export to .pth or .safetensors") from None
    return config | {
        "context_length": ctx_len,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def transformers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under transformers' names."""
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in TRANSFORMERS:
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


@torch.inference_mode()
def difference(model: RWKV, file: Path, tokens: int, config: Path | None = None) -> tuple[float, float]:
    """Compare a written file with the model, both in fp32 on random tokens: the largest absolute
    difference of their logits, and the largest absolute logit.

    Args:
        config: a config.json: load the file with transformers.

    Raises:
        UserError: a logit is NaN or Inf.
    """
    ids = torch.randint(model.sizes.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    ours = model.float().eval()(ids)[0]
    if config:
        theirs = _load_in_transformers(file, config)(ids, use_cache=False).logits
    else:
        theirs = checkpoint.load_model(file).eval()(ids)[0]
    found = float((theirs - ours).abs().max()), float(ours.abs().max())
    if not all(map(math.isfinite, found)):
        raise UserError(
            "the logits of the original or the exported model are NaN or Inf, so the export cannot be verified; nothing is written"
        )
    return found


def _load_in_transformers(file: Path, config: Path) -> Any:
    from transformers import RwkvForCausalLM

    with tempfile.TemporaryDirectory() as folder:  # with the file names that it expects
        (Path(folder) / "model.safetensors").symlink_to(file.resolve())
        (Path(folder) / "config.json").symlink_to(config.resolve())
        return RwkvForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
