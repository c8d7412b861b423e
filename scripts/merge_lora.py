"""Merge a LoRA adapter into its base, and prove it: prints the largest logit difference between merged and base + adapter.

    python scripts/merge_lora.py --adapter out/lora/rwkv-0.pth --output merged.pth
    python scripts/merge_lora.py --adapter a.pth,b.pth --weights 0.7,0.3 --output both.pth
    python scripts/merge_lora.py [--use-gpu] 32 base.pth lora.pth merged.pth      # upstream's form: alpha, base, adapter, output

The merged model has the base's dtypes. An adapter made for another base is refused.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

from rwkv.cli import parse, sentences
from rwkv.config import MergeConfig
from rwkv.errors import UserError, printable


def positional(argv: list[str]) -> list[str]:
    """Upstream's `[--use-gpu] alpha base adapter output` as flags; any other command line as it is."""
    switches = [word for word in argv if word in ("--use-gpu", "--use_gpu", "--force")]
    words = [word for word in argv if word not in switches]
    if len(words) != 4 or any(word.startswith("--") for word in words):
        return argv
    flags = zip(("--lora_alpha", "--base", "--adapter", "--output"), words, strict=True)
    return [*(f"{flag}={word}" for flag, word in flags), *switches]


def numbers(text: str, count: int) -> list[float]:
    """The weights as they were typed, 1 each if none were."""
    try:
        found = [float(word) for word in text.split(",")] if text else [1.0] * count
    except ValueError:
        raise UserError(f"--weights {text}: numbers separated by commas, such as 0.7,0.3") from None
    if not all(map(math.isfinite, found)):
        raise UserError(f"--weights {text}: numbers separated by commas, such as 0.7,0.3; NaN and Inf are none")
    if len(found) != count:
        raise UserError(
            f"--weights {text}: {len(found)} of them for {count} adapters; give one for each, or leave it out"
        )
    return found


def main(config: MergeConfig) -> None:
    import torch

    from rwkv import checkpoint
    from rwkv.adapters import lora
    from rwkv.weights import manifest as manifests

    if not config.adapter or not config.output:
        raise UserError("--adapter and --output are needed")
    checkpoint.check_output(config.output)
    if os.path.lexists(config.output) and not config.force:
        raise UserError(f"{config.output} exists already; give --force to replace it, or another --output")
    adapters = (
        [config.adapter]
        if os.path.exists(config.adapter)
        else [path.strip() for path in config.adapter.split(",") if path.strip()]
    )
    weights = numbers(config.weights, len(adapters))
    manifest = checkpoint.adapter_manifest(adapters[0])
    base = config.base or checkpoint.find_base(adapters[0])
    if not base and manifest.get("base"):
        raise UserError(
            f"{adapters[0]}: its base {manifest['base']}, which the .json beside it names, is not there; give --base"
        )
    if not base:
        raise UserError(f"{adapters[0]}: there is no .json beside it that names its base; give --base")
    device = "cuda" if config.use_gpu else "cpu"
    if config.use_gpu and not torch.cuda.is_available():
        raise UserError("--use_gpu: torch sees no GPU; check nvidia-smi, or leave it out")
    model, stored = checkpoint.load_combined(base, adapters, weights, config.lora_alpha or None)
    model.eval().to(device)
    tokens = torch.randint(
        model.sizes.vocab_size, (1, max(1, config.check_tokens)), generator=torch.Generator().manual_seed(0)
    ).to(device)

    @torch.inference_mode()
    def logits() -> torch.Tensor:
        return model.float()(tokens)[0]

    apart = logits() if config.check_tokens else None
    if apart is not None and not torch.isfinite(apart).all():
        raise UserError(
            f"{config.adapter}: the logits of base + adapter are NaN or Inf, so that nothing can be proved of the merged model, and none is written. Its"
            " alpha or --weights are too large, or the adapter's training diverged"
        )
    lora.merge(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored[name])
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"{config.adapter}: {name} of the merged model is NaN or Inf in {str(stored[name]).removeprefix('torch.')}; nothing is written. Its alpha"
                " or --weights are too large, or the base's dtype cannot hold the sum"
            )
    found: dict[str, float] = {}

    def prove(_: Path) -> None:
        if apart is not None:
            found["difference"] = float((logits() - apart).abs().max())
            if not math.isfinite(found["difference"]):
                raise UserError(f"{config.output}: the logits of the merged model are NaN or Inf; nothing is written")

    origin: dict[str, Any] = {
        key: manifest[key] for key in ("base_sha256", "tokenizer", "data", "data_sha256") if key in manifest
    }
    sources = {manifests.portable(path, config.output): weight for path, weight in zip(adapters, weights, strict=True)}
    checkpoint.save_model(config.output, model, {"merged_from": sources, "base": str(base), **origin}, check=prove)
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in stored.values()})
    print(printable(f"merged: {config.output} ({', '.join(dtypes)})"))
    if apart is not None:
        print(
            f"check:  largest logit difference between merged and base + adapter {found['difference']:.2e} (largest logit"
            f" {float(apart.abs().max()):.2f})"
        )


if __name__ == "__main__":
    with sentences():
        main(parse(MergeConfig, __doc__, positional(sys.argv[1:])))
