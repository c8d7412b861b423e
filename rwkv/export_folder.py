"""Export a model as a folder for transformers or flash-linear-attention, or an adapter as a folder
for peft, and verify what was written.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv import adapter_files, checkpoint
from rwkv.errors import UserError
from rwkv.export import (
    DTYPES,
    Exported,
    Source,
    as_folder,
    compare,
    compare_logits,
    logits_of,
    random_tokens,
    short_dtypes,
    world_tokens,
)
from rwkv.files import atomic_writes
from rwkv.formats import hf_tokenizer, peft, transformers
from rwkv.formats.lazy import Lazy
from rwkv.models import version
from rwkv.models.rwkv import shapes, unused
from rwkv.weights import safetensors_file

FORMATS = ("transformers", "fla", "peft")
_AGAIN = "Run the same command again; if it fails again, check the disk"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def existing(output: Path) -> Path:
    """A file that the export would replace, or the one that it writes first."""
    names = (WEIGHTS, INDEX, "adapter_model.safetensors")
    return next((output / name for name in names if os.path.lexists(output / name)), output / WEIGHTS)


def mark_of(weights: Path) -> Path:
    """The file that is written last in a folder with these weights: without it no program reads the
    folder.
    """
    return weights.with_name("adapter_config.json" if weights.name.startswith("adapter") else "config.json")


def layout_of(kind: str, source: Source) -> str:
    """The layout of a folder: fla or transformers; for `folder` the model's default.

    Raises:
        UserError: no program reads such a folder.
    """
    known = list(transformers.LAYOUTS.get(source.version, ()))
    if not known or kind not in ("folder", *known):
        models = " and ".join(name for name, layouts in transformers.LAYOUTS.items() if kind in ("folder", *layouts))
        raise UserError(
            f"{source.path}: an RWKV-{source.version} model; {'a folder' if kind == 'folder' else kind} can be written of RWKV-{models} only. Export to"
            " .pth or .safetensors"
        )
    return known[0] if kind == "folder" else kind


def export_folder(
    source: Source, output: Path, layout: str, dtype: str, tokens: int, ctx_len: int, shard_bytes: int
) -> Exported:
    """Write a folder, and verify it: read back under BlinkDL's names, and if transformers has a
    class for it, with its logits in transformers.

    Args:
        layout: fla or transformers.
        dtype: of all tensors: fp32, bf16, fp16; keep.
        tokens: number of random tokens on which logits are compared; 0: only weights.
        ctx_len: for config.json.
        shard_bytes: size above which the weights are split into several files.

    Raises:
        UserError: the layout cannot represent the model, a value overflows, or a logit is NaN or
            Inf; nothing is written.
    """
    known = transformers.LAYOUTS[source.version][layout]
    settings = known.config(source.sizes, ctx_len)
    tensors = known.convert(source.cast(dtype), source.sizes)
    settings["torch_dtype"] = str(tensors[next(iter(tensors))].dtype).removeprefix("torch.")
    texts = {"config.json": _json(settings), **_tokenizer_files(source)}
    shards = split(tensors, shard_bytes)
    if len(shards) > 1:
        places = {key: name for name, part in shards.items() for key in part}
        texts[INDEX] = _json({"metadata": {"total_size": sum(map(_bytes, tensors.values()))}, "weight_map": places})
    expected = logits_of(source.load(), tokens) if tokens else None
    stale = [name for name in _weights_in(output) if name not in shards and name not in texts]
    mark, made = mark_of(output / WEIGHTS), not output.exists()
    parts = [name for name in (*shards, *stale, *texts) if name != mark.name]
    output.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_writes([output / name for name in parts], [mark]) as temporaries:
            files = dict(zip((*parts, mark.name), temporaries, strict=True))
            for name, part in shards.items():
                safetensors_file.save(part, files[name])
            for name, text in texts.items():
                files[name].write_text(text, encoding="utf-8")
            for name in stale:
                files.pop(name).unlink()
            with as_folder(files) as folder:
                dtypes = short_dtypes(tensors.values())
                found = compare(source, _read(folder, source), None if known.reader else expected, dtypes, folder)
                if known.reader and expected is not None:
                    theirs = _logits_in_transformers(known.reader, folder, source, tokens)
                    found = compare_logits(dtypes, found.weights, expected, theirs)
    except BaseException:
        if made:
            shutil.rmtree(output)
        raise
    return found


def _read(folder: Path, source: Source) -> dict[str, Tensor]:
    """A written folder's tensors, with those that no computation uses as in the source."""
    found = checkpoint.read_tensors(folder)
    names = shapes(source.sizes)
    found = {name: tensor for name, tensor in found.items() if name in names or not transformers.UNUSED.match(name)}
    return {name: torch.zeros(names[name]) for name in unused(source.sizes)} | found


def _tokenizer_files(source: Source) -> dict[str, str]:
    """The World tokenizer's files; none for models with another tokenizer or a smaller
    vocabulary.
    """
    try:
        tokens = world_tokens(source)
    except UserError:
        return {}
    complete = source.sizes.vocab_size >= len(tokens) and len(tokens) == 65536
    return hf_tokenizer.files(tokens, source.sizes.vocab_size) if complete else {}


def split(tensors: Mapping[str, Lazy], shard_bytes: int) -> dict[str, dict[str, Lazy]]:
    """The tensors of each file, by its name: one file, or several of at most `shard_bytes`."""
    parts: list[dict[str, Lazy]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + _bytes(tensor) > shard_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += _bytes(tensor)
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


def _weights_in(output: Path) -> list[str]:
    """Names of weights, and of their index, in a folder."""
    pattern = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    return sorted(name for name in os.listdir(output) if re.fullmatch(pattern, name)) if output.is_dir() else []


def _bytes(tensor: Lazy) -> int:
    return tensor.numel() * tensor.element_size()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@torch.inference_mode()
def _logits_in_transformers(reader: str, folder: Path, source: Source, tokens: int) -> Tensor:
    import transformers as library  # takes seconds, and not every export needs it

    model = getattr(library, reader).from_pretrained(folder, torch_dtype=torch.float32).eval()
    return model(random_tokens(source.sizes, tokens), use_cache=False).logits[0]


def export_adapter(adapter: str, base: str, output: Path, alpha: float | None, dtype: str = "keep") -> float:
    """Write an adapter as a folder for peft, and verify that it is read back unchanged; returns the
    largest absolute difference of a weight from the original's, which is rounding to `dtype`.

    Raises:
        UserError: not an adapter on this base, or one that trains more than linear layers.
    """
    if not adapter:
        raise UserError("--format peft writes an adapter: pass it as --lora")
    if dtype not in ("keep", *DTYPES):
        raise UserError(f"--dtype {dtype}: peft files cannot hold it; use {', '.join(DTYPES)}, or keep")
    found, known = adapter_files.inspect_adapter(adapter, base, alpha)
    sizes = checkpoint.sizes_of(checkpoint.read_tensors(base), base)
    lazy = {name: Lazy.of(tensor) for name, tensor in found.items()}
    if dtype != "keep":
        lazy = {name: tensor.cast(DTYPES[dtype], name) for name, tensor in lazy.items()}
    tensors = peft.convert(lazy, version.version_of(sizes).NAME)
    settings = peft.config(tensors, known["r"], known["alpha"], Path(base).name)
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    names = ["adapter_model.safetensors", "adapter_config.json"]
    try:
        with atomic_writes([output / names[0]], [mark_of(output / names[0])]) as temporaries:
            safetensors_file.save(tensors, temporaries[0])
            temporaries[1].write_text(_json(settings), encoding="utf-8")
            with as_folder(dict(zip(names, temporaries, strict=True))) as folder:
                written, described = adapter_files.inspect_adapter(folder)
                if described["alpha"] != known["alpha"] or written.keys() != found.keys():
                    raise UserError(
                        f"{output}: the written adapter differs from {adapter}; nothing is written. {_AGAIN}"
                    )
                difference = 0.0
                for name, tensor in written.items():
                    if not torch.equal(tensor, lazy[name].make()):
                        raise UserError(f"{output}: {name} differs from {adapter}; nothing is written. {_AGAIN}")
                    difference = max(difference, float((tensor.float() - found[name].float()).abs().max()))
    except BaseException:
        if made:
            shutil.rmtree(output)
        raise
    return difference
