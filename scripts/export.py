"""Export a model to a format that other programs read, and verify the logits.

    python scripts/export.py --model tuned.pth --output tuned.safetensors --dtype bf16
    # a folder for transformers' RwkvForCausalLM.from_pretrained
    python scripts/export.py --model tuned.pth --output tuned-hf

The suffix of the output selects the format: .pth (read by ChatRWKV, rwkv.cpp and the PyPI package
rwkv), .safetensors, or a folder for transformers.
"""

import json
import os
import shutil
from pathlib import Path

from rwkv.cli import parse, report_errors
from rwkv.config import ExportConfig
from rwkv.errors import UserError, printable


def main(config: ExportConfig) -> None:
    from rwkv import checkpoint, export
    from rwkv.files import atomic_writes

    if not config.model or not config.output:
        raise UserError("--model and --output are required")
    output = Path(config.output)
    folder = config.output.endswith("/") or (os.path.isdir(output) and output.suffix not in (".pth", ".safetensors"))
    if not folder:
        checkpoint.check_output(output, (".pth", ".safetensors", ""))
    written = output if output.suffix in (".pth", ".safetensors") and not folder else output / "model.safetensors"
    if os.path.lexists(written) and not config.force:
        raise UserError(f"{written} already exists; pass --force to replace it, or choose another --output")
    model = checkpoint.load_model(config.model, dtype=None)
    tensors = export.tensors_of(model, config.dtype)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    origin = {
        "exported_from": os.path.abspath(config.model),
        **{k: v for k, v in checkpoint.read_manifest(config.model).items() if k in ("tokenizer", "step")},
    }
    found: tuple[float, float] | None = None

    def verify(file: Path, described: Path | None = None) -> None:
        nonlocal found
        if config.check_tokens:
            found = export.difference(model, file, config.check_tokens, described)

    if written is output:
        checkpoint.write_tensors(output, tensors, {"kind": "model", **checkpoint.describe(model), **origin}, verify)
    else:
        settings = export.transformers_config(model, config.ctx_len, tensors["head.weight"].dtype)
        made = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_writes([written, output / "config.json"]) as (weights, described):
                checkpoint.save_safetensors(export.transformers_names(tensors), weights)
                described.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
                verify(weights, described)
        except BaseException:
            if made:
                shutil.rmtree(output)
            raise
    print(printable(f"exported: {output} ({', '.join(dtypes)})"))
    if found:
        print(
            printable(
                f"check:    largest logit difference from {config.model} {found[0]:.2e} (largest logit {found[1]:.2f})"
            )
        )


if __name__ == "__main__":
    with report_errors():
        main(parse(ExportConfig, __doc__))
