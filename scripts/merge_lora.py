"""Merge a LoRA adapter into its base, and prove it: prints the largest logit difference between merged and base + adapter.

    python scripts/merge_lora.py --adapter out/lora/rwkv-0.pth --output merged.pth
    python scripts/merge_lora.py [--use-gpu] 32 base.pth lora.pth merged.pth      # upstream's form: alpha, base, adapter, output

The merged model has the base's dtypes. An adapter made for another base is refused.
"""

import sys
from pathlib import Path

from rwkv.cli import parse, sentences
from rwkv.config import MergeConfig
from rwkv.errors import UserError


def positional(argv: list[str]) -> list[str]:
    """Upstream's `[--use-gpu] alpha base adapter output` as flags; any other command line as it is."""
    switches = [word for word in argv if word in ("--use-gpu", "--use_gpu", "--force")]
    words = [word for word in argv if word not in switches]
    if len(words) != 4 or any(word.startswith("--") for word in words):
        return argv
    flags = zip(("--lora_alpha", "--base", "--adapter", "--output"), words, strict=True)
    return [*(f"{flag}={word}" for flag, word in flags), *switches]


def main(config: MergeConfig) -> None:
    import torch

    from rwkv import checkpoint, lora

    if not config.adapter or not config.output:
        raise UserError("--adapter and --output are needed")
    if Path(config.output).exists() and not config.force:
        raise UserError(f"{config.output} exists already; give --force to replace it, or another --output")
    manifest = checkpoint.read_manifest(config.adapter)
    base = config.base or manifest.get("base")
    if not base:
        raise UserError(f"{config.adapter}: there is no .json beside it that names its base; give --base")
    device = "cuda" if config.use_gpu else "cpu"
    if config.use_gpu and not torch.cuda.is_available():
        raise UserError("--use_gpu: torch sees no GPU; check nvidia-smi, or leave it out")
    model, stored = checkpoint.load_tuned(base, config.adapter, config.lora_alpha or None)
    model.eval().to(device)
    tokens = torch.randint(model.sizes.vocab_size, (1, max(1, config.check_tokens)), generator=torch.Generator().manual_seed(0)).to(device)

    @torch.inference_mode()
    def logits() -> torch.Tensor:
        return model.float()(tokens)[0]

    apart = logits() if config.check_tokens else None
    lora.merge(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored[name])
    origin = {key: manifest[key] for key in ("base", "base_sha256", "tokenizer", "data", "data_sha256") if key in manifest}
    checkpoint.save_model(config.output, model, {"merged_from": config.adapter, **origin})
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in stored.values()})
    print(f"merged: {config.output} ({', '.join(dtypes)})")
    if apart is not None:
        difference = float((logits() - apart).abs().max())
        print(
            f"check:  largest logit difference between merged and base + adapter {difference:.2e} (largest logit {float(apart.abs().max()):.2f})"
        )


if __name__ == "__main__":
    with sentences():
        main(parse(MergeConfig, __doc__, positional(sys.argv[1:])))
