"""Export a model to a format that other programs read, and verify what was written.

    python scripts/export.py --model tuned.pth --output tuned.safetensors --dtype bf16
    # an adapter, merged into its base, for llama.cpp and Ollama
    python scripts/export.py --model base.pth --lora rwkv-0.pth --output tuned.gguf --dtype q8_0
    # a folder for transformers
    python scripts/export.py --model tuned.pth --output tuned-hf
    # a transformers folder back into one file
    python scripts/export.py --model tuned-hf --output tuned.pth

The suffix of the output selects the format: .pth (ChatRWKV, PyPI's rwkv), .safetensors, .gguf
(llama.cpp, Ollama), .st (web-rwkv, Ai00), .bin (rwkv.cpp), or a folder for transformers. See
docs/export.md.
"""

import os
from pathlib import Path

from rwkv.cli import parse, report_errors
from rwkv.config import ExportConfig
from rwkv.errors import UserError, printable


def main(config: ExportConfig) -> None:
    from rwkv import checkpoint, export, export_folder, merge
    from rwkv.files import is_unfinished

    base = config.model or (str(merge.base_of(config.lora)) if config.lora else "")
    if not base or not config.output:
        raise UserError("--model and --output are required")
    for name in ("ctx_len", "max_shard_gb"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name} must be greater than 0; it is {getattr(config, name):g}")
    if not 0 <= config.check_tokens <= checkpoint.MAX_CHECKED:
        raise UserError(
            f"--check_tokens {config.check_tokens}: must be from 0 (only weights) to {checkpoint.MAX_CHECKED:,}"
        )
    if config.lora_alpha and not config.lora:
        raise UserError("--lora_alpha needs an adapter: pass --lora, or omit --lora_alpha")
    output = Path(config.output)
    kind = export.format_of(config.output) if config.format == "auto" else config.format
    folder = kind in ("folder", *export_folder.FORMATS)
    written = export_folder.existing(output) if folder else output
    if not folder and os.path.isdir(output):
        raise UserError(f"{output}: a folder; pass a file name")
    if folder and os.path.lexists(output) and not os.path.isdir(output):
        raise UserError(f"{output}: a file or a broken link, but this format is a folder; pass another --output")
    unfinished = is_unfinished(written, export_folder.mark_of(written) if folder else checkpoint.manifest_path(output))
    if os.path.lexists(written) and not (config.force or unfinished):
        raise UserError(f"{written} already exists; pass --force to replace it, or choose another --output")
    if kind == "peft":
        if config.state:
            raise UserError(f"--format peft cannot store --state {config.state}: omit it")
        difference = export_folder.export_adapter(config.lora, base, output, config.lora_alpha or None, config.dtype)
        print(printable(f"exported: {output} (peft adapter)"))
        print(printable(f"check:    largest difference from {config.lora}: weights {difference:.2e}"))
        return
    source = export.open_source(base, config.lora, config.lora_alpha or None, config.state)
    tokens = config.check_tokens
    if folder:
        kind = export_folder.layout_of(kind, source)
    export.check_state(kind, source)
    dtype = export.dtype_in(kind, config.dtype, source)
    if folder:
        shard = int(config.max_shard_gb * 1e9)
        found = export_folder.export_folder(source, output, kind, dtype, tokens, config.ctx_len, shard)
    else:
        origin = {
            "exported_from": os.path.abspath(base),
            **({"adapter": os.path.abspath(config.lora)} if config.lora else {}),
            **{k: v for k, v in checkpoint.read_manifest(base).items() if k in ("tokenizer", "step")},
        }
        found = export.export_file(source, output, kind, dtype, tokens, origin)
    print(printable(f"exported: {output} ({', '.join(found.dtypes)})"))
    checked = f"largest difference from {source.label}: weights {found.weights:.2e}"
    if found.logits is not None:
        checked += f", logits {found.logits:.2e} (largest logit {found.largest:.2f})"
    print(printable(f"check:    {checked}"))
    if note := export.state_note(kind, source):
        print(printable(f"note:     {note}"))


if __name__ == "__main__":
    with report_errors():
        main(parse(ExportConfig, __doc__))
