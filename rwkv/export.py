"""A checkpoint in the forms that other programs read: one file in another dtype, or a folder of transformers' RwkvForCausalLM."""

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
    """All weights under BlinkDL's names in fp32, bf16 or fp16; `keep`: as they are.

    Raises:
        UserError: a weight that fp16 does not hold.
    """
    made = {
        name: p.detach() if dtype == "keep" else p.detach().to(DTYPES[dtype]) for name, p in model.named_parameters()
    }
    if lost := [name for name, tensor in made.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{lost[0]} is not finite in {dtype}; give --dtype bf16 or fp32")
    return made


def transformers_config(model: RWKV, ctx_len: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the model in transformers.

    Raises:
        UserError: a model that transformers does not support.
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
    made = {}
    for name, tensor in tensors.items():
        for ours, theirs in TRANSFORMERS:
            name = name.replace(ours, theirs)
        made[name] = tensor
    return made


@torch.inference_mode()
def difference(model: RWKV, file: Path, tokens: int, config: Path | None = None) -> tuple[float, float]:
    """The largest difference between the logits of the model and of the file that was written, on random tokens, both computed in fp32; and the largest
    logit. With `config`, a config.json, the file is read by transformers.

    Raises:
        UserError: some logit is NaN or Inf, so that nothing is proved.
    """
    ids = torch.randint(model.sizes.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    ours = model.float().eval()(ids)[0]
    if config:
        theirs = _by_transformers(file, config)(ids, use_cache=False).logits
    else:
        theirs = checkpoint.load_model(file).eval()(ids)[0]
    found = float((theirs - ours).abs().max()), float(ours.abs().max())
    if not all(map(math.isfinite, found)):
        raise UserError(
            "the logits of the model, or of what would be written, are NaN or Inf, so that nothing can be proved; nothing is written"
        )
    return found


def _by_transformers(file: Path, config: Path) -> Any:
    from transformers import RwkvForCausalLM

    with tempfile.TemporaryDirectory() as folder:  # under the names that it looks for
        (Path(folder) / "model.safetensors").symlink_to(file.resolve())
        (Path(folder) / "config.json").symlink_to(config.resolve())
        return RwkvForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
