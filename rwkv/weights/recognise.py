"""Identify files that are not checkpoints, by content, and say what to do with each."""

import os
import re
from pathlib import Path
from typing import BinaryIO

from rwkv.errors import FileFormatError, printable
from rwkv.weights.archive import NotPlain
from rwkv.weights.pickled_names import Forbidden

_AGAIN = "Download it again"
_USE = "Use a .pth or .safetensors file"
_MAGIC = (
    (
        b"GGUF",
        "a GGUF file (llama.cpp), which is made for inference. Use the .pth or .safetensors that it was converted from",
    ),
    (b"fmgg", "a GGML file (rwkv.cpp), which is made for inference. Use the .pth that it was converted from"),
    (b"lmgg", "a GGML file, which is made for inference. Use the .pth that it was converted from"),
    (b"tjgg", "a GGML file (GGJT), which is made for inference. Use the .pth that it was converted from"),
    (b"algg", "a LoRA adapter of llama.cpp (GGLA). Use the adapter that it was converted from"),
    (b"\x93NUMPY", f"a numpy array, not a checkpoint. {_USE}"),
    (b"\x1f\x8b", "compressed with gzip. Unpack it with gunzip first"),
    (b"BZh", "compressed with bzip2. Unpack it with bunzip2 first"),
    (b"\xfd7zXZ\0", "compressed with xz. Unpack it with unxz first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd. Unpack it with unzstd first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive. Unpack it first"),
    (b"Rar!", "a RAR archive. Unpack it first"),
    (b"\x89HDF\r\n\x1a\n", f"an HDF5 file (Keras or TensorFlow), not an RWKV checkpoint. {_USE}"),
    (b"PAR1", f"a parquet file: data, not a model. {_USE}"),
    (b"ARROW1", f"an Arrow file: data, not a model. {_USE}"),
    (b"MMIDIDX", f"the index of a binidx: data, not a model. {_USE}"),
    (b"SQLite format 3", f"a database, not a model. {_USE}"),
    (b"\x7fELF", f"a program or library, not a model. {_USE}"),
    (b"%PDF", f"a PDF document, not a model. {_USE}"),
    (b"\x89PNG", f"an image, not a model. {_USE}"),
    (b"PK\x05\x06", f"an empty zip archive. {_USE}"),
)
_PICKLED = (  # patterns of the first forbidden name in a pickle, and what such files are
    (r"deepspeed\.|.*ZeroStage|.*fp32_groups", "a DeepSpeed training state. Convert the folder with the zero_to_fp32.py in it, and use its output"),
    (r"(pytorch_)?lightning|argparse\.Namespace|omegaconf\.", "a training checkpoint that contains more than weights. Save only its state_dict, and use that"),
    (r"(torch\.nn\.modules|__main__|src\.|rwkv\w*\.|model\w*\.|transformers\.models)", "a whole model object, which is code. Save only its state_dict, and use that"),
    (r"numpy\.", "a file that contains numpy arrays. Save only its tensors, with torch.save or safetensors"),
    (r"(bitsandbytes|torchao|auto_gptq|awq|quanto|hqq)", "a quantised model. Use the original, in fp32, bf16 or fp16"),
    (r"torch\.(jit|fx|package|_dynamo)", "a program (TorchScript or fx), which is code. Use the state_dict that it was made from"),
    (r"torch\.distributed|torch\._C\._distributed", "a sharded checkpoint of torch.distributed. Merge it into one state_dict first"),
    (r"torch\.optim|torch\._utils\._rebuild_wrapper_subclass|torch\.distributed", "a training state, not a model's state_dict. Save only the state_dict"),
)  # fmt: skip


def describe_file(file: BinaryIO) -> str:
    """Say what an open file is that is neither a torch.save nor a safetensors file, and what to
    do.
    """
    size = os.fstat(file.fileno()).st_size
    head = os.pread(file.fileno(), 4096, 0)
    if not size:
        return f"empty. {_AGAIN}"
    if found := next((text for magic, text in _MAGIC if head.startswith(magic)), None):
        return found
    if head[257:262] == b"ustar":
        return "a tar archive. Unpack it first, and use the checkpoint in it; the tar format of torch before 0.1.10 is not supported"
    if not head.strip(b"\0"):
        return f"filled with zeros at its beginning: an incomplete download. {_AGAIN}"
    if head[:1] == b"\x08" and re.search(rb"pytorch|onnx|ir_version|producer|tf2onnx", head[:200]):
        return "an ONNX model, which is made for inference. Use the .pth that it was exported from"
    if head[4:8] == b"TFL3":
        return f"a TensorFlow Lite model, not an RWKV checkpoint. {_USE}"
    text = _decode(head)
    return (
        f"not a checkpoint: neither a torch.save nor a safetensors file, nor another known format. {_USE}"
        if text is None
        else _describe_text(text, size)
    )


def _decode(head: bytes) -> str | None:
    """The head as text; None if it is not text."""
    for encoding in ("utf-8-sig", "utf-16"):
        if encoding == "utf-16" and head[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            continue
        for end in range(4):  # the last character may be incomplete
            try:
                text = head[: len(head) - end].decode(encoding)
            except UnicodeDecodeError:
                continue
            return text if text.isprintable() or not re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text) else None
    return None


def _describe_text(text: str, size: int) -> str:
    begin = text.lstrip()
    if begin.startswith("version https://git-lfs") or begin.startswith("version https://hawser"):
        real = re.search(r"^size (\d+)", begin, re.MULTILINE)
        of = f" ({int(real[1][:20]):,} bytes)" if real else ""
        return (
            f"a git-lfs pointer of {size} bytes, not the checkpoint itself{of}. Run `git lfs install` and `git lfs pull` in that repository, or"
            " download the file from its page"
        )
    if re.match(r"<!doctype html|<html|<head|<body|<script", begin, re.IGNORECASE):
        return f"a web page (HTML), not the checkpoint: a link to a page or a login was downloaded. {_AGAIN}, from the file's own link"
    if begin.startswith("<"):
        return f"XML text, probably a server's error message. {_AGAIN}: {_quoted(begin)}"
    if begin.startswith(("{", "[")):
        if '"weight_map"' in begin:
            return (
                "the index of a model in several files, not a model. Make one file of its folder:"
                " python scripts/export.py --model FOLDER --output model.pth"
            )
        if '"peft_type"' in begin:
            return "the configuration of a peft adapter. Use its folder, or adapter_model.safetensors beside it"
        if '"model_type"' in begin or '"architectures"' in begin:
            return "the configuration of a transformers model, not its weights. Use model.safetensors or pytorch_model.bin beside it"
        return f"JSON text, not a model. {_AGAIN}, if it is a server's answer: {_quoted(begin)}"
    return f"text, not a model: {_quoted(begin)}. {_AGAIN}, or use the right file"


def _quoted(text: str) -> str:
    return f'"{printable(" ".join(text.split())[:60])}…"'


def describe_folder(path: Path) -> str:
    """Say what a folder is that was passed instead of a model file, and what to do."""
    try:
        names = set(os.listdir(path))
    except OSError as error:
        return f"a folder that cannot be read ({error.strerror})"
    if "adapter_config.json" in names:
        return "a folder with a peft adapter, not a model. Use the model that the adapter was trained on"
    if names & {"model.safetensors.index.json", "pytorch_model.bin.index.json"}:
        return (
            "a transformers folder with a model in several files. Make one file of it:"
            " python scripts/export.py --model FOLDER --output model.pth"
        )
    if files := [name for name in ("model.safetensors", "pytorch_model.bin") if name in names]:
        return f"a transformers folder; use the file in it: {path / files[0]}"
    if (
        any(re.fullmatch(r"(zero_pp_rank|bf16_zero_pp_rank|mp_rank)_.*\.pt", name) for name in names)
        or "zero_to_fp32.py" in names
    ):
        return "a DeepSpeed training state. Convert it with the zero_to_fp32.py in it, and use its output"
    found = sorted(name for name in names if name.endswith((".pth", ".safetensors", ".bin", ".pt")))
    if found:
        return f"a folder; use a file in it, such as {path / found[-1]}"
    return "a folder, not a checkpoint; pass a file"


def describe_error(error: FileFormatError) -> str:
    """Say what a file is that begins like a torch.save file, and why it cannot be read."""
    if isinstance(error, Forbidden):
        kind = next((text for pattern, text in _PICKLED if re.match(pattern, error.name)), "")
        return f"{kind} ({error})" if kind else f"not a checkpoint of tensors only: {error}. Use the model's state_dict"
    if isinstance(error, NotPlain):
        names = error.names
        if "TorchScript" in str(error):
            return str(error)
        if any(name.endswith(".npy") for name in names):
            return "a numpy archive (.npz), not a checkpoint"
        if "[Content_Types].xml" in names or "META-INF/MANIFEST.MF" in names:
            return "a document or program stored as a zip archive, not a checkpoint"
        if inside := [name for name in names if name.endswith((".pth", ".pt", ".bin", ".safetensors", ".gguf"))]:
            return f"a zip archive. Unpack it, and use {printable(inside[0])} from it"
    return f"not a checkpoint that can be read: {error}"
