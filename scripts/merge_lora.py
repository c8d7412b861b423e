"""Merge a LoRA adapter or a tuned state into its base, and compare logits with base + adapter.

    python scripts/merge_lora.py --adapter out/lora/rwkv-0.pth --output merged.pth
    python scripts/merge_lora.py --adapter a.pth,b.pth --weights 0.7,0.3 --output both.pth
    # a tuned state becomes part of the model, which then begins every text with it
    python scripts/merge_lora.py --adapter out/state/rwkv-0.pth --output tuned.pth
    # positional arguments as upstream: alpha, base, adapter, output
    python scripts/merge_lora.py [--use-gpu] 32 base.pth lora.pth merged.pth

The merged model keeps the dtypes of the base. An adapter trained on another base is rejected.
"""

import math
import os
import sys

from rwkv.cli import parse, report_errors
from rwkv.config import MergeConfig
from rwkv.errors import UserError, printable


def from_upstream_form(argv: list[str]) -> list[str]:
    """Convert upstream's arguments `[--use-gpu] alpha base adapter output` to flags; return any
    other argv unchanged.

    Raises:
        UserError: positional arguments, but not four.
    """
    switches = [word for word in argv if word in ("--use-gpu", "--use_gpu", "--force")]
    words = [word for word in argv if word not in switches]
    if any(word.startswith("-") for word in words) or not "".join(words).strip():
        return argv
    if len(words) != 4:
        raise UserError(
            f"arguments without flags are LORA_ALPHA BASE ADAPTER OUTPUT, in this order; there are {len(words)}. Or use --adapter, --base and --output"
        )
    flags = zip(("--lora_alpha", "--base", "--adapter", "--output"), words, strict=True)
    return [*(f"{flag}={word}" for flag, word in flags), *switches]


def adapter_weights(text: str, count: int) -> list[float]:
    """The adapters' weights from --weights; by default 1 each. Raises UserError if invalid."""
    try:
        found = [float(word) for word in text.split(",")] if text else [1.0] * count
    except ValueError:
        raise UserError(f"--weights {text}: expected numbers separated by commas, such as 0.7,0.3") from None
    if not all(map(math.isfinite, found)):
        raise UserError(f"--weights {text}: expected finite numbers separated by commas, such as 0.7,0.3")
    if len(found) != count:
        raise UserError(
            f"--weights {text}: {len(found)} weights for {count} adapters; pass one for each, or omit --weights"
        )
    return found


def main(config: MergeConfig) -> None:
    import torch

    from rwkv import checkpoint
    from rwkv.files import is_unfinished
    from rwkv.merge import merge

    if not config.adapter or not config.output:
        raise UserError("--adapter and --output are required")
    if not 0 <= config.check_tokens <= checkpoint.MAX_CHECKED:
        raise UserError(
            f"--check_tokens {config.check_tokens}: must be from 0 (no check) to {checkpoint.MAX_CHECKED:,}"
        )
    checkpoint.check_output(config.output)
    unfinished = is_unfinished(config.output, checkpoint.manifest_path(config.output))
    if os.path.lexists(config.output) and not (config.force or unfinished):
        raise UserError(f"{config.output} already exists; pass --force to replace it, or choose another --output")
    adapters = [path.strip() for path in config.adapter.split(",") if path.strip()]
    if os.path.exists(config.adapter):  # a file name that contains a comma
        adapters = [config.adapter]
    weights = adapter_weights(config.weights, len(adapters))
    if config.use_gpu and not torch.cuda.is_available():
        raise UserError("--use_gpu: torch sees no GPU; check nvidia-smi, or omit --use_gpu to merge on the CPU")
    device = "cuda" if config.use_gpu else "cpu"
    alpha = config.lora_alpha or None
    merged = merge(config.output, adapters, weights, config.base, alpha, config.check_tokens, device)
    print(printable(f"merged: {config.output} ({', '.join(merged.dtypes)})"))
    if merged.difference is not None:
        print(
            f"check:  largest logit difference between merged and base + adapter {merged.difference:.2e} (largest logit"
            f" {merged.largest:.2f})"
        )


if __name__ == "__main__":
    with report_errors():
        main(parse(MergeConfig, __doc__, from_upstream_form(sys.argv[1:])))
