"""Write a model in a form that other programs read, and prove it: prints how far the logits of what was written differ.

    python scripts/export.py --model tuned.pth --output tuned.safetensors --dtype bf16
    python scripts/export.py --model tuned.pth --output tuned-hf            # a folder for transformers' RwkvForCausalLM.from_pretrained

The ending of the output says which: .pth (ChatRWKV, rwkv.cpp and the PyPI package rwkv read it), .safetensors, or a folder.
"""

from pathlib import Path

from rwkv.cli import parse, sentences
from rwkv.config import ExportConfig
from rwkv.errors import UserError


def main(config: ExportConfig) -> None:
    from rwkv import checkpoint, export
    from rwkv.files import whole, write_json

    if not config.model or not config.output:
        raise UserError("--model and --output are needed")
    output = Path(config.output)
    written = output if output.suffix in (".pth", ".safetensors") else output / "model.safetensors"
    if written.exists() and not config.force:
        raise UserError(f"{written} exists already; give --force to replace it, or another --output")
    model = checkpoint.load_model(config.model, dtype=None)
    tensors = export.tensors_of(model, config.dtype)
    origin = {
        "exported_from": config.model,
        **{k: v for k, v in checkpoint.read_manifest(config.model).items() if k in ("tokenizer", "step")},
    }
    if written is output:
        checkpoint.write_tensors(output, tensors, {"kind": "model", "version": "4", "sizes": vars(model.sizes), **origin})
    else:
        described = export.transformers_config(model.sizes, config.ctx_len, tensors["head.weight"].dtype)
        output.mkdir(parents=True, exist_ok=True)
        with whole(written) as temporary:
            checkpoint.save_safetensors(export.transformers_names(tensors), temporary)
        write_json(output / "config.json", described)
    print(f"exported: {output} ({', '.join(sorted({str(t.dtype).removeprefix('torch.') for t in tensors.values()}))})")
    if config.check_tokens:
        apart, largest = export.difference(model, output, config.check_tokens)
        print(f"check:    largest logit difference from {config.model} {apart:.2e} (largest logit {largest:.2f})")


if __name__ == "__main__":
    with sentences():
        main(parse(ExportConfig, __doc__))
